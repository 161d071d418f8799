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
from rich.progress import Progress
from rich.table import Table

from demo.build_index import DemoError, prepare
from demo.calibration_report import write_report
from demo.invented import Verdict, ask_about_invented
from demo.pair import Pair
from demo.settings import EvaluateSettings, demo_settings
from rag_client import Answer, RagClientError, Strategy
from rag_client import evaluate as evaluate_pair
from rag_client.evaluate import Calibrations
from rag_client.evaluation_views import calibration_table
from rag_client.options import GenerateOptions
from rag_client.question_file import Question, QuestionFileError, read_questions

_SAMPLE = 40
_SEED = 7


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
    """Asks, counts, prints, and writes what files are named. Raises QuestionFileError, DemoError or RagClientError."""
    questions = read_questions(settings.questions)
    if settings.quick:
        questions = random.Random(_SEED).sample(questions, min(_SAMPLE, len(questions)))
    prepare(settings, console)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    found: dict[str, Calibrations] = {}
    n_docs = 0
    with running_generator(settings, console) as generator:
        for strategy in Strategy:
            began = time.monotonic()
            answers = ask_all(generator, questions, strategy, settings, console)
            seconds[strategy.value] = time.monotonic() - began
            rows += figures(strategy, questions, answers)
            found[strategy.value] = evaluate_pair.calibrations(questions, answers)
            n_docs = max(answer.n_docs for answer in answers)
        console.print("asking about invented countries, added to the corpus", highlight=False)
        verdicts = ask_about_invented(generator, settings, settings.num_beams)
    console.print(figures_table(rows, seconds), invented_table(verdicts))
    for name, both in found.items():
        console.print(
            calibration_table(f"{name}: does a document with posterior p hold the answer?", both.documents)
        )
        console.print(calibration_table(f"{name}: is an answer with confidence p right?", both.answers))
    if settings.report_folder:
        write_report(
            Path(settings.report_folder),
            found,
            questions=len(questions),
            num_beams=settings.num_beams,
            n_docs=n_docs,
        )
    if settings.json_file:
        write_figures(Path(settings.json_file), settings, rows, verdicts)


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


def ask_all(
    generator: str,
    questions: Sequence[Question],
    strategy: Strategy,
    settings: EvaluateSettings,
    console: Console,
) -> list[Answer]:
    """Asks in batches, a few at once, with progress shown; answers come in the order of the questions."""
    options: GenerateOptions = {
        "strategy": strategy,
        "n_docs": settings.n_docs or None,
        "num_beams": settings.num_beams,
    }
    with Progress(console=console) as progress:
        task = progress.add_task(strategy.value, total=len(questions))
        work = evaluate_pair.ask_all(
            generator,
            questions,
            options,
            batch_size=settings.batch_size,
            concurrency=settings.concurrency,
            timeout_s=settings.start_timeout_s,
            asked=lambda count: progress.advance(task, count),
        )
        return asyncio.run(work)


def figures(strategy: Strategy, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Row]:
    """Counts each split, then all of them."""
    splits = sorted({one.split for one in questions})
    rows = []
    for split in [*splits, "all"]:
        chosen = [pair for pair in zip(questions, answers, strict=True) if split in {pair[0].split, "all"}]
        counted = evaluate_pair.figures([one for one, _ in chosen], [answer for _, answer in chosen])
        rows.append(
            Row(
                strategy.value,
                split,
                counted.questions,
                exact_match=counted.exact_match,
                f1=counted.f1,
                recall=counted.recall,
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
    except (DemoError, QuestionFileError, RagClientError) as error:
        console.print(f"demo.evaluate: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
