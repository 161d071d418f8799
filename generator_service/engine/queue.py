"""Requests that wait for a place: by priority, then by arrival."""

from __future__ import annotations

import heapq
import itertools

from generator_service.engine.request import Request


class WaitingQueue:
    """A heap of requests; aborted ones are forgotten lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._order = itertools.count()
        self._members: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def push(self, request: Request) -> None:
        """Add a request; lower priorities go first, and among equals the one that came first."""
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (request.work.priority, request.arrived_s, next(self._order), request))

    def peek(self) -> Request | None:
        """The request that goes next."""
        while self._heap and self._heap[0][-1].request_id not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Request:
        """Take the request that goes next; the queue must not be empty."""
        request = self.peek()
        if request is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        del self._members[request.request_id]
        return request

    def remove(self, request_id: int) -> Request | None:
        """Forget a request; None where it is not here."""
        return self._members.pop(request_id, None)

    def expired(self, now_s: float) -> list[Request]:
        """Requests whose deadline has passed."""
        return [r for r in self._members.values() if r.expired(now_s)]
