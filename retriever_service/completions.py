"""The work after the search, of many requests, in few threads and few hand-overs."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from rag_serving.request_deadline import request_deadline_s
from retriever_service.work_limit import WorkLimit

_WorkT = TypeVar("_WorkT")
_AnswerT = TypeVar("_AnswerT")
_JOBS_AT_ONCE = 32
"""Jobs that a thread does before it hands their results over: few, so that the first need not wait long."""


@dataclass(eq=False, slots=True)
class _Job(Generic[_WorkT, _AnswerT]):
    work: _WorkT
    done: asyncio.Future[_AnswerT]
    deadline_s: float | None
    limit: WorkLimit | None = None
    answer: _AnswerT | None = None
    error: BaseException | None = None


class Completions(Generic[_WorkT, _AnswerT]):
    """Runs short jobs in at most `max_threads` threads; those that wait are done many at a time.

    A job of its own for each request has every thread and the event loop wait for the interpreter's lock, and
    costs two wake-ups each. A job that was cancelled before its turn is left out; where jobs fail together, each
    is done alone, so that only the one at fault fails. All methods belong to the event loop's thread.
    """

    def __init__(
        self,
        executor: Executor,
        max_threads: int,
        do_all: Callable[[Sequence[_WorkT]], Sequence[_AnswerT]],
    ) -> None:
        """`do_all` does jobs together and returns their answers in order; it runs in the threads."""
        self._executor = executor
        self._max_threads = max_threads
        self._do_all = do_all
        self._waiting: deque[_Job[_WorkT, _AnswerT]] = deque()
        self._running = 0

    async def run(self, work: _WorkT) -> _AnswerT:
        """Returns the answer of one job, or raises what it raises alone."""
        loop = asyncio.get_running_loop()
        job: _Job[_WorkT, _AnswerT] = _Job(work, loop.create_future(), request_deadline_s())
        self._waiting.append(job)
        # Not at once: what else this turn of the loop brings goes along.
        loop.call_soon(self._start, loop)
        try:
            return await job.done
        except asyncio.CancelledError:
            if job.limit is not None:
                job.limit.leave()
            raise

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting and self._running < self._max_threads:
            jobs = [self._waiting.popleft() for _ in range(min(_JOBS_AT_ONCE, len(self._waiting)))]
            jobs = [job for job in jobs if not job.done.done()]
            limit = WorkLimit.latest(job.deadline_s for job in jobs)
            for job in jobs:
                job.limit = limit
            self._running += 1
            self._executor.submit(limit.run, self._work, jobs, loop)

    def _work(self, jobs: list[_Job[_WorkT, _AnswerT]], loop: asyncio.AbstractEventLoop) -> None:
        awaited = [job for job in jobs if not job.done.done()]
        self._do(awaited)
        loop.call_soon_threadsafe(self._deliver, awaited, loop)

    def _do(self, jobs: list[_Job[_WorkT, _AnswerT]]) -> None:
        if not jobs:
            return
        try:
            for job, answer in zip(jobs, self._do_all([job.work for job in jobs]), strict=True):
                job.answer = answer
        except BaseException as error:  # noqa: BLE001  (it belongs to the one who waits for the job)
            if len(jobs) == 1:
                jobs[0].error = error
                return
            for job in jobs:
                self._do([job])

    def _deliver(self, jobs: list[_Job[_WorkT, _AnswerT]], loop: asyncio.AbstractEventLoop) -> None:
        self._running -= 1
        for job in jobs:
            if job.done.done():
                continue
            if job.error is not None:
                job.done.set_exception(job.error)
            else:
                job.done.set_result(cast(_AnswerT, job.answer))
        self._start(loop)
