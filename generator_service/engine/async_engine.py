"""The asyncio face of the engine: submit work, await answers; cancelling aborts it on the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from generator_service.engine.messages import (
    Encoded,
    EncodeQuestion,
    GenerateAnswer,
    Generated,
    Ready,
    Scored,
    ScoreTarget,
    Work,
)
from generator_service.engine.worker import Worker
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

    def check_room(self, count: int) -> None:
        """Raises QueueFullError where count further questions are more than the service takes."""
        if self.num_pending + count > self._max_queued:
            raise QueueFullError(
                f"{self.num_pending} questions are in work and the service takes {self._max_queued}", 1.0
            )

    async def encode(self, work: EncodeQuestion) -> npt.NDArray[np.float32]:
        """question_hidden_states of one question, float32 [dim]."""
        report = await self._submit(work)
        assert isinstance(report, Encoded)
        return np.frombuffer(report.hidden_states, dtype="<f4").astype(np.float32)

    async def generate(self, work: GenerateAnswer) -> Generated:
        """Answer one question."""
        report = await self._submit(work)
        assert isinstance(report, Generated)
        return report

    async def score(self, work: ScoreTarget) -> Scored:
        """Score one target."""
        report = await self._submit(work)
        assert isinstance(report, Scored)
        return report

    async def _submit(self, work: Work) -> object:
        usable = [worker for worker in self.workers if worker.ready is not None]
        if not usable:
            raise WorkerLostError(", ".join(worker.device for worker in self.workers))
        worker = min(usable, key=lambda w: w.num_pending)
        return await worker.submit(msgspec.structs.replace(work, request_id=worker.next_id()))


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
