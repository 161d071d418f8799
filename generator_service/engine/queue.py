"""Requests that wait for a place: by priority and arrival, so that nobody waits for ever."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Generator

from generator_service.engine.messages import EncodeQuestion
from generator_service.engine.request import Request

_Entry = tuple[bool, float, int, Request]

_COMPACT_FROM = 64
"""Removed requests that a heap may hold before it is looked at whether they are the most of it."""


class WaitingQueue:
    """A heap of requests; removed ones are forgotten lazily.

    A request's place is its arrival, moved back by priority_step_s seconds for each level of its priority. Whatever
    arrives later than that goes behind it: low priority is a longer wait, not an endless one. Questions to encode go
    before all others: they are short, and retrieval waits for them.
    """

    def __init__(self, priority_step_s: float = 1.0) -> None:
        self._priority_step_s = priority_step_s
        self._heap: list[_Entry] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._order = itertools.count()
        self._members: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def push(self, request: Request) -> None:
        """Add a request."""
        order = next(self._order)
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (*self._place(request), order, request))
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, order, request))

    def peek(self) -> Request | None:
        """The request that goes next."""
        while self._heap and not self._waits(self._heap[0][-1]):
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def in_order(self) -> Generator[Request]:
        """All requests, the next one first; one looked at may be removed. Close it, to put back the rest."""
        seen: list[_Entry] = []
        try:
            while (request := self.peek()) is not None:
                seen.append(heapq.heappop(self._heap))
                yield request
        finally:
            for entry in seen:
                if self._waits(entry[-1]):
                    heapq.heappush(self._heap, entry)

    def remove(self, request_id: int) -> Request | None:
        """Forget a request; None where it is not here."""
        request = self._members.pop(request_id, None)
        if request is not None:
            self._compact()
        return request

    def take_expired(self, now_s: float) -> list[Request]:
        """Take the requests whose deadline has passed."""
        expired: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = heapq.heappop(self._deadlines)[-1]
            if self._waits(request):
                del self._members[request.request_id]
                expired.append(request)
        return expired

    def _place(self, request: Request) -> tuple[bool, float]:
        work = request.work
        if isinstance(work, EncodeQuestion):
            return False, request.arrived_s
        return True, request.arrived_s + work.priority * self._priority_step_s

    def _waits(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request

    def _compact(self) -> None:
        """Callers that go away must not leave more behind than those who wait."""
        most = 2 * len(self._members) + _COMPACT_FROM
        if len(self._heap) > most:
            self._heap = [entry for entry in self._heap if self._waits(entry[-1])]
            heapq.heapify(self._heap)
        if len(self._deadlines) > most:
            self._deadlines = [entry for entry in self._deadlines if self._waits(entry[-1])]
            heapq.heapify(self._deadlines)
