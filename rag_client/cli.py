"""The `rag` command: ask, explain, retrieve, score, eval, status, documents, index."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rag_client import documents_command, evaluate, evaluation_views, index_command, provenance_views, views
from rag_client.aio import GENERATOR_SERVICE, RETRIEVER_SERVICE
from rag_client.command_line import (
    Generator,
    Json,
    Retriever,
    Timeout,
    connected,
    print_json,
    print_json_line,
    shown_progress,
)
from rag_client.options import GenerateOptions
from rag_client.question_file import QuestionFileError, read_questions
from rag_client.settings import client_settings
from rag_client.types import AnswerPiece, Generation, Health, Strategy

app = typer.Typer(
    help="Ask a running pair of retriever and generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(documents_command.app, name="documents")
app.add_typer(index_command.app, name="index")

StrategyOption = Annotated[
    Strategy | None, typer.Option("--strategy", help="Marginalisation; the checkpoint's own if left out.")
]
NDocs = Annotated[int | None, typer.Option("--n-docs", help="Documents for each question.")]


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
    with connected(settings) as client:
        if stream:
            _show_stream(client.generate_stream(question, **options), as_json=as_json)
            return
        generation = client.generate(question, **options)
    if as_json:
        print_json(generation)
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
    with connected(settings) as client:
        found = client.explain(
            question, answer, strategy=strategy, n_docs=n_docs, num_beams=num_beams, include_documents=True
        )
    if as_json:
        print_json(found)
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
    with connected(settings), shown_progress("{task.description}", hidden=as_json) as progress:
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
        print_json({"figures": figures, "calibration": calibrations, "answers": told})
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
    with connected(settings) as client:
        found = client.retrieve(question, n_docs=n_docs, include_documents=True, skip_contexts=True)
    if as_json:
        print_json(found)
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
    with connected(settings) as client:
        scores = client.score([question] * len(targets), targets, strategy=strategy, n_docs=n_docs)
    if as_json:
        print_json(scores)
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
    with connected(settings) as client:
        health = client.health()
        model = client.get_model() if health[GENERATOR_SERVICE] is Health.SERVING else None
        index = client.get_index() if health[RETRIEVER_SERVICE] is Health.SERVING else None
    if as_json:
        print_json({"health": health, "addresses": addresses, "model": model, "index": index})
    else:
        Console().print(views.status_view(health, addresses, model, index))
    if any(state is not Health.SERVING for state in health.values()):
        raise typer.Exit(1)


def _show_stream(events: Iterator[AnswerPiece | Generation], *, as_json: bool) -> None:
    """Pieces as they come, then the answer with its documents; as JSON one event a line."""
    begun = False
    for event in events:
        if as_json:
            print_json_line(event)
        elif isinstance(event, AnswerPiece):
            typer.echo(event.text_delta, nl=False)
            begun = begun or bool(event.text_delta)
        else:
            if begun:
                typer.echo("\n")
            Console().print(views.answer_view(event, event.answers[0]))


def main() -> None:
    """Runs the command line."""
    app(prog_name="rag")


if __name__ == "__main__":
    main()
