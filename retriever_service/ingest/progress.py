"""How a build goes on: bars on a terminal, a line now and then anywhere else."""

import contextlib
import time
from collections.abc import Callable, Iterator

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


Estimate = Callable[[int], int | None]


@contextlib.contextmanager
def shown_progress(console: Console, estimate: Estimate = lambda _done: None) -> Iterator[BuildProgress]:
    """Gives what a build reports to.

    Where a stage says no total, `estimate` says about how many there are, from how many are done.
    """
    if not console.is_terminal:
        yield _Lines(console, estimate)
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
        yield _Bars(bars, estimate)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


class _Bars:
    """Shows each stage as a progress bar of its own."""

    def __init__(self, bars: Progress, estimate: Estimate) -> None:
        self._bars = bars
        self._estimate = estimate
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        total = self._estimate(done) if total is None else total
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._bars.update(task, total=self._bars.tasks[task].completed or 1)
                self._bars.stop_task(task)
            self._tasks[stage] = self._bars.add_task(_described(stage, done), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)


class _Lines:
    """Prints a line when a stage begins, every ten seconds and when it ends: logs show no bars."""

    def __init__(self, console: Console, estimate: Estimate) -> None:
        self._console = console
        self._estimate = estimate
        self._stage = ""
        self._began_s = self._said_s = 0.0
        self._began_at = 0
        self._unsaid: int | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now_s = time.monotonic()
        if stage != self._stage:
            if self._unsaid is not None:
                self._say(self._unsaid, "", now_s)
            self._stage, self._began_s, self._began_at = stage, now_s, done
        elif done != total and now_s - self._said_s < _SECONDS_PER_LINE:
            self._unsaid = done
            return
        self._say(done, self._of(done, total), now_s)

    def _of(self, done: int, total: int | None) -> str:
        if total is not None:
            return f" of {total:,}"
        about = self._estimate(done)
        return "" if about is None else f" of about {about:,}"

    def _say(self, done: int, of: str, now_s: float) -> None:
        self._said_s, self._unsaid = now_s, None
        took_s = now_s - self._began_s
        speed = f", {(done - self._began_at) / took_s:,.0f}/s" if took_s > 0 and done > 1 else ""
        said = f"{_described(self._stage, self._began_at)}: {done:,}{of}{speed}"
        self._console.print(said, highlight=False, soft_wrap=True)


def _described(stage: str, began_at: int) -> str:
    return f"{_STAGES[stage]}, going on after {began_at:,}" if began_at else _STAGES[stage]
