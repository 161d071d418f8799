"""The work after the search, of many requests, in few threads and few hand-overs."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
_JOBS_AT_ONCE = 16
"""Jobs that a thread does before it hands their results over: few, so that the first need not wait long."""


@dataclass(eq=False, slots=True)
class _Job:
    work: Callable[[], Any]
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Completions:
    """Runs short jobs in at most `max_threads` threads; those that wait are taken many at a time.

    A job of its own for each request has every thread and the event loop wait for the interpreter's lock, and
    costs two wake-ups each. A job that was cancelled before its turn is left out. All methods belong to the event
    loop's thread.
    """

    def __init__(self, executor: Executor, max_threads: int) -> None:
        self._executor = executor
        self._max_threads = max_threads
        self._waiting: deque[_Job] = deque()
        self._running = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """Returns what `work` returns, or raises what it raises."""
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.create_future())
        self._waiting.append(job)
        # Not at once: what else this turn of the loop brings goes along.
        loop.call_soon(self._start, loop)
        result: _T = await job.done
        return result

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting and self._running < self._max_threads:
            jobs = [self._waiting.popleft() for _ in range(min(_JOBS_AT_ONCE, len(self._waiting)))]
            self._running += 1
            self._executor.submit(self._work, jobs, loop)

    def _work(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        for job in jobs:
            if job.done.done():
                continue
            try:
                job.result = job.work()
            except BaseException as error:  # noqa: BLE001  (it belongs to the one who waits for the job)
                job.error = error
        loop.call_soon_threadsafe(self._deliver, jobs, loop)

    def _deliver(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        self._running -= 1
        for job in jobs:
            if job.done.done():
                continue
            if job.error is None:
                job.done.set_result(job.result)
            else:
                job.done.set_exception(job.error)
        self._start(loop)
