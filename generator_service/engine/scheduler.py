"""Which requests run in the next step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from generator_service.engine.cache_manager import CacheManager
from generator_service.engine.messages import EncodeQuestion
from generator_service.engine.queue import WaitingQueue
from generator_service.engine.request import Request, RequestState
from generator_service.engine.room import Room
from generator_service.types import Batching

_MAX_BLOCKED = 16
"""Requests that do not fit, beyond which no smaller one is looked for in a step."""


@dataclass(frozen=True)
class SchedulerLimits:
    """What one step may hold; each bound lets at least one request through, however large.

    A level of priority is worth priority_step_s seconds of waiting. Large requests leave some rows to small ones, as
    they do with the cache (see Room); one that is wider than max_rows counts as the widest that does. A request that
    does not fit is passed by smaller ones behind it, by max_passes of them at most; then room is kept for it.
    Batching.GATHER and GATHER_EARLY are the classic dynamic batcher, there to compare with: whatever waits and fits
    runs as one batch, and nothing joins until it is through.
    """

    max_rows: int = 1024
    max_context_tokens: int = 4096
    max_questions_encoded: int = 64
    priority_step_s: float = 1.0
    max_passes: int = 32
    batching: Batching = Batching.CONTINUOUS


@dataclass
class Schedule:
    """What a step does: questions to encode, requests that join, and those that have lost their place."""

    encode: list[Request] = field(default_factory=list)
    admit: list[Request] = field(default_factory=list)
    dropped: list[Request] = field(default_factory=list)


class Scheduler:
    """Step-granular admission: a request joins at the next step that has room and leaves when it is done."""

    def __init__(self, cache: CacheManager, limits: SchedulerLimits) -> None:
        self.waiting = WaitingQueue(limits.priority_step_s)
        self.running: dict[int, Request] = {}
        self.cache = cache
        self._limits = limits
        self._row_limit = limits.max_rows
        self._aborted: list[Request] = []

    def add_request(self, request: Request) -> None:
        """Queue a request that can fit (see CacheManager.can_ever_fit)."""
        self.waiting.push(request)

    def abort(self, request_id: int) -> None:
        """Take a request out, wherever it is; its rows are gone before the next step."""
        request = self.waiting.remove(request_id) or self.running.get(request_id)
        if request is not None:
            request.state = RequestState.FINISHED_ABORTED
            self._aborted.append(request)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(len(self.waiting) or self.running or self._aborted)

    def schedule(self) -> Schedule:
        """Decide the next step."""
        schedule = Schedule(dropped=self._aborted)
        self._aborted = []
        self._expire(schedule)
        for request in schedule.dropped:
            self._forget(request)
        self._admit(schedule)
        return schedule

    def finish(self, request: Request, state: RequestState) -> None:
        """The request needs no more steps."""
        if state is RequestState.FINISHED_ANSWERED:
            self._row_limit = min(self._limits.max_rows, self._row_limit + request.max_rows)
        request.state = state
        self._forget(request)

    def shed(self, interrupted: Sequence[Request]) -> list[Request]:
        """The device ran out of memory in a step: everybody waits again, and fewer will run at once.

        interrupted are the requests that the step was to encode. Returns the one request that ran alone, which no
        smaller step can help. The limit grows back as questions are answered, so that there is always progress.
        """
        running = list(self.running.values())
        self._row_limit = max(1, min(self._row_limit, self.num_rows) // 2)
        hopeless = running if len(running) == 1 and not interrupted else []
        for request in running:
            self._forget(request)
            if request not in hopeless:
                request.state = RequestState.WAITING
                self.waiting.push(request)
        for request in interrupted:
            self.waiting.push(request)
        return hopeless

    @property
    def num_rows(self) -> int:
        """Decoder rows of the running requests at their widest."""
        return sum(r.max_rows for r in self.running.values())

    def _forget(self, request: Request) -> None:
        self.running.pop(request.request_id, None)
        self.cache.release(request)

    def _expire(self, schedule: Schedule) -> None:
        now_s = time.monotonic()
        for request in self.waiting.take_expired(now_s):
            request.state = RequestState.FINISHED_EXPIRED
            schedule.dropped.append(request)
        for request in self.running.values():
            if request.expired(now_s):
                request.state = RequestState.FINISHED_EXPIRED
                schedule.dropped.append(request)

    def _admit(self, schedule: Schedule) -> None:
        """Let in what fits, in the queue's order; what does not is passed by smaller ones, but not for ever."""
        rows, tokens = self._rows(), 0
        gathers = self._limits.batching is not Batching.CONTINUOUS
        closed = gathers and bool(self.running)
        max_tokens = float("inf") if gathers else self._limits.max_context_tokens
        blocked: list[Request] = []
        with contextlib.closing(self.waiting.in_order()) as waiting:
            for request in waiting:
                if isinstance(request.work, EncodeQuestion):
                    if len(schedule.encode) == self._limits.max_questions_encoded:
                        return
                    schedule.encode.append(request)
                    self.waiting.remove(request.request_id)
                    continue
                if closed or any(b.times_passed >= self._limits.max_passes for b in blocked):
                    return
                tokens += sum(request.context_lengths)
                if schedule.admit and tokens > max_tokens:
                    return
                width = min(request.max_rows, rows.largest)
                crowded = self.running and not rows.fits(width)
                if crowded or not self.cache.reserve(request):
                    tokens -= sum(request.context_lengths)
                    blocked.append(request)
                    if len(blocked) == _MAX_BLOCKED:
                        return
                    continue
                rows.take(width)
                for passed in blocked:
                    passed.times_passed += 1
                self._start(request, schedule)

    def _rows(self) -> Room:
        """The rows of a step; a request that is wider than one can be leaves some of them to others, too."""
        rows = Room(self._row_limit)
        for request in self.running.values():
            rows.take(min(request.max_rows, rows.largest))
        return rows

    def _start(self, request: Request, schedule: Schedule) -> None:
        self.waiting.remove(request.request_id)
        request.state, request.admitted_s = RequestState.RUNNING, time.monotonic()
        self.running[request.request_id] = request
        schedule.admit.append(request)
