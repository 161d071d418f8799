"""Admission by memory: the bytes of a request are known, and reserved, before it runs."""

from __future__ import annotations

from generator_service.engine.request import Request
from generator_service.engine.room import Room


class CacheManager:
    """Bytes of the device's caches: contexts' keys and values, and the rows' own.

    Where the device lends pages of page_slots slots, every context and cache is reckoned up to a whole page. Large
    requests leave some of the budget to small ones (see Room).
    """

    def __init__(
        self, *, budget_bytes: int, bytes_per_context_token: int, bytes_per_slot: int, page_slots: int = 1
    ) -> None:
        self.budget_bytes = budget_bytes
        self._room = Room(budget_bytes)
        self._context_token = bytes_per_context_token
        self._slot = bytes_per_slot
        self._page_slots = page_slots

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the requests that run."""
        return self._room.taken

    @property
    def max_request_bytes(self) -> int:
        """What one request may hold."""
        return self._room.largest

    def required_bytes(self, request: Request) -> int:
        """What the request holds at its longest."""
        page = self._page_slots
        tokens = sum(-(-length // page) * page for length in request.context_lengths)
        slots = request.max_slots + request.max_caches * (page - 1)
        return tokens * self._context_token + slots * self._slot + request.pass_bytes

    def can_ever_fit(self, request: Request) -> bool:
        """Whether an empty device would take it."""
        return self.required_bytes(request) <= self._room.largest

    def reserve(self, request: Request) -> bool:
        """Set its bytes aside; False where they are not there now."""
        needed = self.required_bytes(request)
        if not self._room.fits(needed):
            return False
        request.reserved_bytes = needed
        self._room.take(needed)
        return True

    def release(self, request: Request) -> None:
        """Give its bytes back; doing so twice changes nothing."""
        self._room.give(request.reserved_bytes)
        request.reserved_bytes = 0
