"""The vectors that came after the snapshot: few, in memory, searched exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.types import Float32Array, Int64Array, Metric

_FIRST_CAPACITY = 64
# Hidden vectors that a search steps over; with more of them, the living ones are copied together.
_MAX_HIDDEN = 512


@dataclass(frozen=True, slots=True)
class FreshVectors:
    """The fresh vectors at one moment: vectors float32 [n, dim], rows int64 [n], hidden bool [n]."""

    vectors: Float32Array
    rows: Int64Array
    hidden: npt.NDArray[np.bool_]
    num_hidden: int

    @property
    def num_living(self) -> int:
        """Vectors that can be found."""
        return len(self.rows) - self.num_hidden

    def search(
        self, questions: Float32Array, n_docs: int, metric: Metric, allowed: Int64Array | None
    ) -> tuple[Int64Array, Float32Array]:
        """Returns rows int64 and scores float32 [batch, at most n_docs], best first, -1 for missing hits.

        Scores are faiss's: inner products, or squared distances. `allowed` are the rows that may be found.
        """
        vectors, rows, hidden, num_hidden = self.vectors, self.rows, self.hidden, self.num_hidden
        if allowed is not None:
            chosen = ~hidden & np.isin(rows, allowed)
            vectors, rows, hidden, num_hidden = vectors[chosen], rows[chosen], hidden[chosen], 0
        wanted = min(len(rows), n_docs + num_hidden)
        if wanted == 0 or len(rows) == num_hidden:
            return np.empty((len(questions), 0), np.int64), np.empty((len(questions), 0), np.float32)
        kind = faiss.METRIC_INNER_PRODUCT if metric is Metric.INNER_PRODUCT else faiss.METRIC_L2
        scores, places = faiss.knn(questions, vectors, wanted, metric=kind)
        if num_hidden:
            # A stable sort moves the hits that are hidden behind the others, which keep their order.
            order = np.argsort(hidden[places] | (places < 0), axis=1, kind="stable")[:, :n_docs]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        missing = (places < 0) | hidden[places]
        return np.where(missing, -1, rows[places]), scores


class FreshSegment:
    """Grows and hides; every change makes a new `now`, and what was taken before stays as it was.

    One thread changes it at a time; vectors are appended to a buffer whose filled part is never touched again.
    """

    def __init__(self, dimension: int) -> None:
        self._buffer = np.empty((_FIRST_CAPACITY, dimension), dtype=np.float32)
        self._places: dict[int, int] = {}
        self.now = FreshVectors(self._buffer[:0], np.empty(0, np.int64), np.empty(0, np.bool_), num_hidden=0)

    def change(self, hidden_rows: Sequence[int], rows: Sequence[int], vectors: Float32Array) -> FreshVectors:
        """Returns the vectors without `hidden_rows`, which are here, and with float32 [len(rows), dim] more."""
        filled = len(self.now.rows)
        total = filled + len(rows)
        if total > len(self._buffer):
            grown = np.empty((max(total, 2 * len(self._buffer)), self._buffer.shape[1]), dtype=np.float32)
            grown[:filled] = self._buffer[:filled]
            self._buffer = grown
        self._buffer[filled:total] = vectors
        self._places.update(zip(rows, range(filled, total), strict=True))
        hidden = np.concatenate([self.now.hidden, np.zeros(len(rows), np.bool_)])
        for row in hidden_rows:
            hidden[self._places.pop(row)] = True
        self.now = FreshVectors(
            self._buffer[:total],
            np.concatenate([self.now.rows, np.asarray(rows, np.int64)]),
            hidden,
            num_hidden=int(hidden.sum()),
        )
        if self.now.num_hidden > _MAX_HIDDEN:
            self._copy_together()
        return self.now

    def holds(self, row: int) -> bool:
        """Whether the row is here and not hidden."""
        return row in self._places

    def _copy_together(self) -> None:
        living = ~self.now.hidden
        self._buffer = self.now.vectors[living]
        rows = self.now.rows[living]
        self._places = {int(row): place for place, row in enumerate(rows)}
        self.now = FreshVectors(self._buffer[:], rows, np.zeros(len(rows), np.bool_), num_hidden=0)
