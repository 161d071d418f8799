"""How a build goes on: bars on a terminal, a line now and then anywhere else."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from retriever_service.ingest.vectors import Progress as BuildProgress

_STAGES = {
    "documents": "reading and embedding",
    "train": "training",
    "index": "indexing",
    "publish": "writing",
    "import": "importing",
}
_SECONDS_PER_LINE = 10.0


@contextlib.contextmanager
def shown_progress(console: Console) -> Iterator[BuildProgress]:
    """Gives what a build reports to."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield _Bars(bars)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


class _Bars:
    """Shows each stage as a progress bar of its own."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._bars.update(task, total=self._bars.tasks[task].completed or 1)
                self._bars.stop_task(task)
            self._tasks[stage] = self._bars.add_task(_described(stage, done), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)


class _Lines:
    """Prints a line when a stage begins and every ten seconds: logs show no bars."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._began_s = self._said_s = 0.0
        self._began_at = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now_s = time.monotonic()
        if stage != self._stage:
            self._stage, self._began_s, self._began_at = stage, now_s, done
        elif done != total and now_s - self._said_s < _SECONDS_PER_LINE:
            return
        self._said_s = now_s
        of = "" if total is None else f" of {total:,}"
        took_s = now_s - self._began_s
        speed = f", {(done - self._began_at) / took_s:,.0f}/s" if took_s > 0 and done > 1 else ""
        self._console.print(f"{_described(stage, self._began_at)}: {done:,}{of}{speed}", highlight=False)


def _described(stage: str, began_at: int) -> str:
    return f"{_STAGES[stage]}, going on after {began_at:,}" if began_at else _STAGES[stage]
