"""The asyncio face of the engine: submit work, await answers; cancelling aborts it on the device."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from generator_service.engine.answer_rate import AnswerRate
from generator_service.engine.messages import (
    Encoded,
    EncodeQuestion,
    GenerateAnswer,
    Generated,
    Progress,
    Ready,
    Scored,
    ScoreTarget,
    Work,
)
from generator_service.engine.pass_messages import Pass, PassDone, ReleasePast
from generator_service.engine.worker import OnProgress, Worker
from generator_service.engine.worker_options import WorkerOptions
from generator_service.errors import QueueFullError, WorkerLostError

_T = TypeVar("_T")


class AsyncEngine:
    """All devices of this service; each question goes to the one with the least to do."""

    def __init__(
        self,
        options: Sequence[WorkerOptions],
        *,
        heartbeat_timeout_s: float,
        max_queued: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_queued = max_queued
        self._accepted = 0
        self._rate = AnswerRate()
        self.num_retried = 0
        self.workers = [
            Worker(o, heartbeat_timeout_s=heartbeat_timeout_s, on_change=on_change) for o in options
        ]

    async def start(self) -> Ready:
        """Start every worker; returns what they loaded. Raises StartupError."""
        ready = await asyncio.gather(*(worker.start() for worker in self.workers))
        return ready[0]

    async def stop(self) -> None:
        """End every worker."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    @property
    def num_ready(self) -> int:
        """Workers that take questions now."""
        return sum(worker.ready is not None for worker in self.workers)

    @property
    def num_pending(self) -> int:
        """Requests accepted and not answered yet."""
        return sum(worker.num_pending for worker in self.workers)

    @property
    def max_queued(self) -> int:
        """Requests that are accepted at once at most."""
        return self._max_queued

    @property
    def answers_per_second(self) -> float:
        """Questions, encodings and scores answered, over the last ten seconds."""
        return self._rate.per_second(time.monotonic())

    @contextmanager
    def accepted(self, count: int) -> Iterator[None]:
        """Holds places for count questions while they are worked on.

        Raises QueueFullError where they are more than the service takes, with the time in which, at the recent rate
        of answers, there is room for them.
        """
        excess = self._accepted + count - self._max_queued
        if excess > 0:
            wait_s = self._rate.seconds_for(excess, time.monotonic())
            raise QueueFullError(
                f"{self._accepted} questions are in work and the service takes {self._max_queued}: no room for"
                f" {count} more",
                wait_s,
            )
        self._accepted += count
        try:
            yield
        finally:
            self._accepted -= count

    async def encode(self, work: EncodeQuestion) -> npt.NDArray[np.float32]:
        """question_hidden_states of one question, float32 [dim]."""
        report = await self._submit(work)
        assert isinstance(report, Encoded)
        return np.frombuffer(report.hidden_states, dtype="<f4").astype(np.float32)

    async def generate(self, work: GenerateAnswer, on_progress: OnProgress | None = None) -> Generated:
        """Answer one question; on_progress is told what is certain on the way there, where work.stream asks for it."""
        report = await self._submit(work, on_progress)
        assert isinstance(report, Generated)
        return report

    async def score(self, work: ScoreTarget) -> Scored:
        """Score one target."""
        report = await self._submit(work)
        assert isinstance(report, Scored)
        return report

    async def answer_together(self, works: Sequence[Work]) -> list[object]:
        """Reports on work that shares contexts: all of it goes to one device, which encodes each of them once."""
        worker = self._least_busy()
        return await gather_or_cancel([self._submit(work, worker=worker) for work in works])

    async def run_pass(self, work: Pass, worker: int | None = None) -> tuple[PassDone, int]:
        """One forward pass, on a worker by its number where it continues what that one holds; and whose it was."""
        if worker is None:
            report, chosen = await self._submit_anywhere(work)
        else:
            chosen = self.workers[worker]
            report = await self._submit_to(chosen, work, None)
        assert isinstance(report, PassDone)
        return report, self.workers.index(chosen)

    async def release_past(self, past_key_values: str, worker: int) -> None:
        """Free what a pass left on a worker."""
        holder = self.workers[worker]
        command = ReleasePast(request_id=holder.next_id(), past_key_values=past_key_values)
        await holder.submit(command)

    async def _submit(
        self, work: Work, on_progress: OnProgress | None = None, worker: Worker | None = None
    ) -> object:
        report, _ = await self._submit_anywhere(work, on_progress, worker)
        return report

    async def _submit_anywhere(
        self, work: Work, on_progress: OnProgress | None = None, worker: Worker | None = None
    ) -> tuple[object, Worker]:
        """Answers once; work of a worker that dies goes to another one, once, unless a part of the answer is out."""
        worker, begun = worker or self._least_busy(), False

        def listen(progress: Progress) -> None:
            nonlocal begun
            begun = True
            assert on_progress is not None
            on_progress(progress)

        listener = None if on_progress is None else listen
        try:
            report = await self._submit_to(worker, work, listener)
        except WorkerLostError:
            others = [w for w in self.workers if w is not worker and w.ready is not None]
            if begun or not others:
                raise
            self.num_retried += 1
            worker = min(others, key=lambda w: w.num_pending)
            report = await self._submit_to(worker, work, listener)
        self._rate.count(time.monotonic())
        return report, worker

    def _least_busy(self) -> Worker:
        usable = [worker for worker in self.workers if worker.ready is not None]
        if not usable:
            raise WorkerLostError(", ".join(worker.device for worker in self.workers))
        return min(usable, key=lambda w: w.num_pending)

    @staticmethod
    async def _submit_to(worker: Worker, work: Work, listener: OnProgress | None) -> object:
        return await worker.submit(msgspec.structs.replace(work, request_id=worker.next_id()), listener)


async def gather_or_cancel(works: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results in order; where one fails or the caller goes away, the others are aborted on their devices."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
