"""The rows that meet a filter, and those that are written after it was evaluated."""

import threading
from collections.abc import Callable

import numpy as np

from retriever_service.types import Int64Array, Selection


class MatchingRows(Selection):
    """Grows as searches come to see newer rows, which alone are read then: what a row holds never changes.

    A row of a document that was replaced or deleted may be among them: the index knows which rows live.
    """

    def __init__(
        self, rows: Int64Array, next_row: int, written_between: Callable[[int, int], Int64Array]
    ) -> None:
        """`rows` are those before `next_row`; `written_between` reads those from one row on to before another."""
        super().__init__(rows)
        self._next_row = next_row
        self._written_between = written_between
        self._growing = threading.Lock()

    def rows_before(self, next_row: int) -> Int64Array:
        """Returns the rows: see Selection. Raises what the store raises."""
        with self._growing:
            if next_row > self._next_row:
                self.rows = np.concatenate([self.rows, self._written_between(self._next_row, next_row)])
                self._next_row = next_row
            return self.rows
