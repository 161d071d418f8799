"""The `rag` command: ask, explain, retrieve, score, eval, status."""

import asyncio
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from rag_client import evaluate, evaluation_views, provenance_views, views
from rag_client.aio import GENERATOR_SERVICE, RETRIEVER_SERVICE
from rag_client.client import RagClient
from rag_client.errors import RagClientError, TimedOutError, UnreachableError
from rag_client.options import GenerateOptions
from rag_client.question_file import QuestionFileError, read_questions
from rag_client.settings import ClientSettings, client_settings
from rag_client.types import AnswerPiece, Generation, Health, Strategy

app = typer.Typer(
    help="Ask a running pair of retriever and generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Generator = Annotated[
    str | None,
    typer.Option("--generator", help="Its address (env RAG_CLIENT_GENERATOR, default localhost:50052)."),
]
Retriever = Annotated[
    str | None,
    typer.Option("--retriever", help="Its address (env RAG_CLIENT_RETRIEVER, default localhost:50051)."),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout-s", help="Seconds a call may take (env RAG_CLIENT_TIMEOUT_S, default 60)."),
]
StrategyOption = Annotated[
    Strategy | None, typer.Option("--strategy", help="Marginalisation; the checkpoint's own if left out.")
]
NDocs = Annotated[int | None, typer.Option("--n-docs", help="Documents for each question.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a picture.")]


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    generator: Generator = None,
    strategy: StrategyOption = None,
    n_docs: NDocs = None,
    num_beams: Annotated[int, typer.Option("--num-beams", help="Beams; 1 is greedy search.")] = 4,
    answers: Annotated[int, typer.Option("--answers", help="Answers shown, at most num_beams.")] = 3,
    abstain_below: Annotated[
        float, typer.Option("--abstain-below", help="No answer whose probability is below this, 0 to 1.")
    ] = 0.0,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Colour each word by its document.")
    ] = True,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show a RAG-Token answer as it becomes certain; JSON in lines.")
    ] = False,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Answer a question and show the documents that the answer rests on."""
    settings = client_settings(generator=generator, timeout_s=timeout_s)
    options: GenerateOptions = {
        "strategy": strategy,
        "n_docs": n_docs,
        "num_beams": num_beams,
        "num_return_sequences": min(answers, num_beams),
        "include_documents": True,
        "include_provenance": provenance,
        "abstain_below": abstain_below or None,
    }
    with _client(settings) as client:
        if stream:
            _show_stream(client.generate_stream(question, **options), as_json=as_json)
            return
        generation = client.generate(question, **options)
    if as_json:
        _print_json(generation)
    else:
        Console().print(views.answer_view(generation, generation.answers[0]))


@app.command()
def explain(
    question: Annotated[str, typer.Argument(help="The question.")],
    answer: Annotated[
        str | None, typer.Argument(help="An answer of yours; the best generated one if left out.")
    ] = None,
    generator: Generator = None,
    strategy: StrategyOption = None,
    n_docs: NDocs = None,
    num_beams: Annotated[int, typer.Option("--num-beams", help="Beams; 1 is greedy search.")] = 4,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Show what an answer owes to each document: its log p without it, and what would be answered then."""
    settings = client_settings(generator=generator, timeout_s=timeout_s)
    with _client(settings) as client:
        found = client.explain(
            question, answer, strategy=strategy, n_docs=n_docs, num_beams=num_beams, include_documents=True
        )
    if as_json:
        _print_json(found)
    else:
        Console().print(provenance_views.explanation_view(found.explanations[0]))


@app.command(name="eval")
def evaluate_file(
    file: Annotated[
        Path, typer.Argument(help='A line a question: {"question": …, "answers": […], "key": …}.')
    ],
    generator: Generator = None,
    strategy: StrategyOption = None,
    n_docs: NDocs = None,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Beams; 1 is greedy search.")] = 4,
    abstain_below: Annotated[
        float, typer.Option("--abstain-below", help="No answer whose probability is below this, 0 to 1.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions of a request.")] = 8,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at once.")] = 4,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Ask a file of questions: exact match, F1, recall of the n_docs, calibration."""
    settings = client_settings(generator=generator, timeout_s=timeout_s)
    try:
        questions = read_questions(file)
    except QuestionFileError as error:
        typer.echo(f"rag: {error}", err=True)
        raise typer.Exit(2) from error
    options: GenerateOptions = {
        "strategy": strategy,
        "n_docs": n_docs,
        "num_beams": num_beams,
        "abstain_below": abstain_below or None,
    }
    with (
        _client(settings),
        Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress,
    ):
        task = progress.add_task("asking", total=len(questions))
        answers = asyncio.run(
            evaluate.ask_all(
                settings.generator,
                questions,
                options,
                batch_size=batch_size,
                concurrency=concurrency,
                timeout_s=settings.timeout_s,
                asked=lambda count: progress.advance(task, count),
            )
        )
    figures = evaluate.figures(questions, answers)
    calibrations = evaluate.calibrations(questions, answers)
    if as_json:
        told = [
            {"question": one.question, "answer": answer.text, "confidence": answer.confidence}
            for one, answer in zip(questions, answers, strict=True)
        ]
        _print_json({"figures": figures, "calibration": calibrations, "answers": told})
    else:
        Console().print(evaluation_views.evaluation_view(figures, calibrations))


@app.command()
def retrieve(
    question: Annotated[str, typer.Argument(help="The question.")],
    generator: Generator = None,
    retriever: Retriever = None,
    n_docs: NDocs = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Show the documents found for a question: the generator encodes it, the retriever searches."""
    settings = client_settings(generator, retriever, timeout_s)
    with _client(settings) as client:
        found = client.retrieve(question, n_docs=n_docs, include_documents=True, skip_contexts=True)
    if as_json:
        _print_json(found)
    elif found.documents is None or not found.documents[0]:
        Console().print("no documents")
    else:
        Console().print(views.retrieval_table(found.documents[0], found.doc_scores[0].tolist()))


@app.command()
def score(
    question: Annotated[str, typer.Argument(help="The question.")],
    targets: Annotated[list[str], typer.Argument(help="Answers to score.")],
    generator: Generator = None,
    strategy: StrategyOption = None,
    n_docs: NDocs = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Give log p(answer | question), marginalised over the documents, of answers of yours."""
    settings = client_settings(generator=generator, timeout_s=timeout_s)
    with _client(settings) as client:
        scores = client.score([question] * len(targets), targets, strategy=strategy, n_docs=n_docs)
    if as_json:
        _print_json(scores)
        return
    for target, log_likelihood in zip(targets, scores.log_likelihoods.tolist(), strict=True):
        Console().print(f"{log_likelihood:10.3f}  {target}", markup=False, highlight=False)


@app.command()
def status(
    generator: Generator = None, retriever: Retriever = None, as_json: Json = False, timeout_s: Timeout = None
) -> None:
    """Show whether both services serve, the model and the index; exit status 1 where one does not."""
    settings = client_settings(generator, retriever, timeout_s)
    addresses = {GENERATOR_SERVICE: settings.generator, RETRIEVER_SERVICE: settings.retriever}
    with _client(settings) as client:
        health = client.health()
        model = client.get_model() if health[GENERATOR_SERVICE] is Health.SERVING else None
        index = client.get_index() if health[RETRIEVER_SERVICE] is Health.SERVING else None
    if as_json:
        _print_json({"health": health, "addresses": addresses, "model": model, "index": index})
    else:
        Console().print(views.status_view(health, addresses, model, index))
    if any(state is not Health.SERVING for state in health.values()):
        raise typer.Exit(1)


def _show_stream(events: Iterator[AnswerPiece | Generation], *, as_json: bool) -> None:
    """Pieces as they come, then the answer with its documents; as JSON one event a line."""
    begun = False
    for event in events:
        if as_json:
            typer.echo(json.dumps(_plain(event), ensure_ascii=False, allow_nan=False))
        elif isinstance(event, AnswerPiece):
            typer.echo(event.text_delta, nl=False)
            begun = begun or bool(event.text_delta)
        else:
            if begun:
                typer.echo("\n")
            Console().print(views.answer_view(event, event.answers[0]))


@contextmanager
def _client(settings: ClientSettings) -> Iterator[RagClient]:
    """A client whose failures become one line on stderr and exit status 1."""
    try:
        with RagClient(settings.generator, settings.retriever, timeout_s=settings.timeout_s) as client:
            yield client
    except RagClientError as error:
        typer.echo(f"rag: {_explained(error, settings)}", err=True)
        raise typer.Exit(1) from error


def _explained(error: RagClientError, settings: ClientSettings) -> str:
    side = "generator" if error.address == settings.generator else "retriever"
    if isinstance(error, UnreachableError):
        return f"no {side} at {error.address}: is the pair running? try make run"
    if isinstance(error, TimedOutError):
        return f"no answer from the {side} at {error.address} within {settings.timeout_s:g} s"
    if error.field_violations:
        return "; ".join(f"{one.field}: {one.description}" for one in error.field_violations)
    wait = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    return f"{error.code.name}: {error.message}{wait}"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Returns what JSON can hold; infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Runs the command line."""
    app(prog_name="rag")


if __name__ == "__main__":
    main()
