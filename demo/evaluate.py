"""Measures the demo through a running pair: exact match, F1, recall, and invented countries (make eval-demo)."""

import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.build_index import DemoError, prepare
from demo.evaluation import exact_match, f1
from demo.invented import Verdict, ask_about_invented
from demo.pair import Pair
from demo.settings import EvaluateSettings, demo_settings
from rag_client import Answer, AsyncRagClient, RagClientError, Strategy

_SAMPLE = 40
_SEED = 7


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers, the key of the passage that holds it, and its split."""

    id: str
    question: str
    answers: list[str]
    key: str
    split: str


@dataclass(frozen=True)
class Row:
    """Figures of one strategy on one split, from 0 to 1; recall is of the gold passage in the n_docs."""

    strategy: str
    split: str
    questions: int
    exact_match: float
    f1: float
    recall: float


def evaluate(settings: EvaluateSettings, console: Console) -> None:
    """Asks, counts, prints, and writes the file where one is named. Raises DemoError or RagClientError."""
    questions = read_questions(settings.questions)
    if settings.quick:
        questions = random.Random(_SEED).sample(questions, min(_SAMPLE, len(questions)))
    prepare(settings, console)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    with running_generator(settings, console) as generator:
        for strategy in Strategy:
            began = time.monotonic()
            answers = asyncio.run(ask_all(generator, questions, strategy, settings, console))
            seconds[strategy.value] = time.monotonic() - began
            rows += figures(strategy, questions, answers)
        console.print("asking about invented countries, added to the corpus", highlight=False)
        verdicts = ask_about_invented(generator, settings, settings.num_beams)
    console.print(figures_table(rows, seconds), invented_table(verdicts))
    if settings.json_file:
        write_figures(Path(settings.json_file), settings, rows, verdicts)


def read_questions(path: Path) -> list[Question]:
    """Reads a line a question. Raises DemoError where there is no such file."""
    if not path.is_file():
        raise DemoError(f"there is no file of questions {path}")
    return [Question(**json.loads(line)) for line in path.read_text("utf-8").splitlines() if line]


@contextlib.contextmanager
def running_generator(settings: EvaluateSettings, console: Console) -> Iterator[str]:
    """The address of the generator named, or of one of a pair of our own on free ports."""
    if settings.generator:
        yield settings.generator
        return
    pair = Pair(
        settings.checkpoint, settings.index, settings.logs, host=settings.host, threads=settings.threads
    )
    with pair:
        with console.status("starting retriever and generator"):
            pair.start(settings.start_timeout_s)
        yield pair.generator.grpc


async def ask_all(
    generator: str,
    questions: Sequence[Question],
    strategy: Strategy,
    settings: EvaluateSettings,
    console: Console,
) -> list[Answer]:
    """Asks in batches, a few at once, with progress shown; answers come in the order of the questions."""
    slots = asyncio.Semaphore(settings.concurrency)
    batches = [
        questions[start : start + settings.batch_size]
        for start in range(0, len(questions), settings.batch_size)
    ]
    async with AsyncRagClient(generator, timeout_s=settings.start_timeout_s) as client:

        async def ask(batch: Sequence[Question]) -> list[Answer]:
            async with slots:
                generation = await client.generate(
                    [one.question for one in batch],
                    strategy=strategy,
                    n_docs=settings.n_docs or None,
                    num_beams=settings.num_beams,
                    include_documents=True,
                )
            return generation.answers

        asked = [asyncio.create_task(ask(batch)) for batch in batches]
        try:
            for done in track(asyncio.as_completed(asked), strategy.value, len(asked), console=console):
                await done
        finally:
            for task in asked:
                task.cancel()
    return [answer for task in asked for answer in task.result()]


def figures(strategy: Strategy, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Row]:
    """Counts each split, then all of them."""
    splits = sorted({one.split for one in questions})
    rows = []
    for split in [*splits, "all"]:
        chosen = [
            (one, answer)
            for one, answer in zip(questions, answers, strict=True)
            if split in {one.split, "all"}
        ]
        hits = [any(document.key == one.key for document in answer.documents) for one, answer in chosen]
        rows.append(
            Row(
                strategy.value,
                split,
                len(chosen),
                exact_match=_mean([exact_match(answer.text, one.answers) for one, answer in chosen]),
                f1=_mean([f1(answer.text, one.answers) for one, answer in chosen]),
                recall=_mean(hits),
            )
        )
    return rows


def figures_table(rows: Sequence[Row], seconds: dict[str, float]) -> Table:
    """The figures in percent."""
    table = Table(title="through the running pair", title_justify="left")
    for name in ("strategy", "split"):
        table.add_column(name, no_wrap=True)
    for name in ("questions", "exact match", "F1", "recall", "per second"):
        table.add_column(name, justify="right")
    for row in rows:
        speed = f"{row.questions / seconds[row.strategy]:.1f}" if row.split == "all" else ""
        shares = (f"{share:.1%}" for share in (row.exact_match, row.f1, row.recall))
        table.add_row(row.strategy, row.split, str(row.questions), *shares, speed, end_section=bool(speed))
    return table


def invented_table(verdicts: Sequence[Verdict]) -> Table:
    """What was answered about each invented country."""
    right = sum(one.is_right for one in verdicts)
    table = Table(title=f"invented countries: {right} of {len(verdicts)} right", title_justify="left")
    for name in ("question", "answer", "capital", "best document"):
        table.add_column(name)
    for one in verdicts:
        style = "green" if one.is_right else "red"
        answer = f"[{style}]{one.answer}[/]"
        table.add_row(one.invented.question, answer, one.invented.capital, one.document)
    return table


def write_figures(
    path: Path, settings: EvaluateSettings, rows: Sequence[Row], verdicts: Sequence[Verdict]
) -> None:
    """Writes the figures, and what they were measured with, as JSON."""
    invented = [{**asdict(one.invented), "answer": one.answer, "is_right": one.is_right} for one in verdicts]
    measured = {
        "num_beams": settings.num_beams,
        "n_docs": settings.n_docs,
        "quick": settings.quick,
        "rows": [asdict(row) for row in rows],
        "invented": invented,
    }
    path.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    """The command: python -m demo.evaluate."""
    settings = demo_settings(EvaluateSettings, "demo.evaluate")
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for what it runs with &
        signal.signal(number, signal.default_int_handler)
    try:
        evaluate(settings, console)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DemoError, RagClientError) as error:
        console.print(f"demo.evaluate: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
