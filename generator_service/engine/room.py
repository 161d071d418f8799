"""A quantity of the device that requests take parts of; the large ones leave some of it to the small ones."""

from __future__ import annotations

_KEPT_PART = 16


class Room:
    """So much in all, of which a sixteenth is kept for requests that need no more than it.

    Without it a question that takes everything, or a few that do so together, would hold up all small ones until
    it ends.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.kept = total // _KEPT_PART
        self._large = 0
        self._small = 0

    @property
    def largest(self) -> int:
        """What one request can take at most."""
        return self.total - self.kept

    @property
    def taken(self) -> int:
        """What all of them have now."""
        return self._large + self._small

    def fits(self, amount: int) -> bool:
        """Whether so much can be taken now."""
        if amount <= self.kept:
            return self.taken + amount <= self.total
        return self._large + max(self._small, self.kept) + amount <= self.total

    def take(self, amount: int) -> None:
        """One request takes so much."""
        if amount <= self.kept:
            self._small += amount
        else:
            self._large += amount

    def give(self, amount: int) -> None:
        """One request gives back all that it took."""
        if amount <= self.kept:
            self._small -= amount
        else:
            self._large -= amount
