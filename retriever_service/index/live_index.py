"""A snapshot's index and the changes since, searched as one."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retriever_service.index.base import VectorIndex
from retriever_service.index.fresh_segment import FreshSegment, FreshVectors
from retriever_service.index.index_over import IndexOver
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters, Selection


class _Visible(Selection):
    """A snapshot's places that can be found, as bits; never changed, so that what searches it keeps it."""

    def __init__(self, bits: npt.NDArray[np.uint8], num_visible: int) -> None:
        """`bits` are uint8 [ceil(ntotal / 8)], the lowest of each byte first."""
        super().__init__(np.empty(0, np.int64))
        self._bitmap: npt.NDArray[np.uint8] = bits
        self._num_visible = num_visible

    @classmethod
    def all_of(cls, ntotal: int) -> "_Visible":
        """Nothing is hidden."""
        return cls(np.full((ntotal + 7) // 8, 0xFF, np.uint8), ntotal)

    def __len__(self) -> int:
        return self._num_visible

    def bitmap(self, ntotal: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002  (known)
        """Returns the bits: see Selection."""
        return self._bitmap

    def holds(self, places: Int64Array) -> npt.NDArray[np.bool_]:
        """Whether each place can be found, bool in the shape of places; any answer for -1."""
        found: npt.NDArray[np.bool_] = (self._bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1) != 0
        return found

    def without(self, places: Int64Array) -> "_Visible":
        """Returns what is left once these are hidden."""
        places = np.unique(places)
        num_visible = self._num_visible - int(self.holds(places).sum())
        bits = self._bitmap.copy()
        np.bitwise_and.at(bits, places >> 3, ~(np.uint8(1) << (places & 7).astype(np.uint8)))
        return _Visible(bits, num_visible)


@dataclass(frozen=True, slots=True)
class _State:
    """What a search sees."""

    visible: _Visible
    fresh: FreshVectors
    next_row: int
    """All rows here are before it."""


class LiveIndex(IndexOver):
    """Merges an immutable snapshot, some of whose vectors are hidden, with a fresh exact segment.

    A search takes one state and keeps it, so that it sees all of a batch of changes or nothing of it.
    """

    def __init__(self, base: VectorIndex, rows: Int64Array | None) -> None:
        """`rows` are the row of each of the base's vectors, ascending; None where place and row are one."""
        super().__init__(base)
        self._rows = rows
        self._changing = threading.Lock()
        self._segment = FreshSegment(base.dimension)
        next_row = base.ntotal if rows is None else int(rows.max(initial=-1)) + 1
        self._state = _State(_Visible.all_of(base.ntotal), self._segment.now, next_row)

    @property
    def base(self) -> VectorIndex:
        """The snapshot's index."""
        return self._below

    @property
    def ntotal(self) -> int:
        """Vectors that can be found."""
        state = self._state
        return len(state.visible) + state.fresh.num_living

    @property
    def pending_changes(self) -> int:
        """Vectors hidden or added since the snapshot."""
        state = self._state
        return self._below.ntotal - len(state.visible) + len(state.fresh)

    def change(self, hidden_rows: Sequence[int], rows: Sequence[int], vectors: Float32Array) -> None:
        """Hides rows and adds float32 [len(rows), dim], at once; rows that are not here are hidden already."""
        with self._changing:
            fresh = [row for row in hidden_rows if self._segment.holds(row)]
            built = [row for row in hidden_rows if not self._segment.holds(row)]
            places = self._places(np.asarray(built, np.int64))
            visible = self._state.visible.without(places) if len(places) else self._state.visible
            next_row = max(self._state.next_row, max(rows, default=-1) + 1)
            self._state = _State(visible, self._segment.change(fresh, rows, vectors), next_row)

    def living(self, selection: Selection) -> Int64Array:
        """Returns the rows of a selection that a search finds now: see VectorIndex."""
        state = self._state
        allowed = selection.rows_before(state.next_row)
        places = self._places(allowed)
        places = places[state.visible.holds(places)]
        built = places if self._rows is None else self._rows[places]
        return np.sort(np.concatenate([built, state.fresh.living(allowed)]))

    def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """Finds the rows nearest to each vector: see VectorIndex.

        Where the snapshot's scores are approximate and there are fresh vectors, up to twice as many rows come,
        for the stored embeddings to decide between.
        """
        state = self._state
        allowed = None if selection is None else selection.rows_before(state.next_row)
        rows, scores = self._search_base(state, vectors, n_docs, parameters, allowed)
        if not state.fresh.num_living:
            return rows, scores
        questions = np.ascontiguousarray(vectors, dtype=np.float32)
        fresh_rows, fresh_scores = state.fresh.search(questions, n_docs, self.metric, allowed)
        rows = np.concatenate([rows, fresh_rows], axis=1)
        nearness = np.concatenate([scores, fresh_scores], axis=1)
        if self.metric is Metric.L2:
            nearness = -nearness
        nearness = np.where(rows < 0, -np.inf, nearness).astype(np.float32)
        # A snapshot's approximate scores and exact ones do not compare: then all candidates are given.
        kept = n_docs if self.has_exact_scores else 2 * n_docs
        order = np.argsort(-nearness, axis=1, kind="stable")[:, :kept]
        merged = np.take_along_axis(nearness, order, 1)
        return np.take_along_axis(rows, order, 1), -merged if self.metric is Metric.L2 else merged

    def _search_base(
        self,
        state: _State,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        allowed: Int64Array | None,
    ) -> tuple[Int64Array, Float32Array]:
        hides = len(state.visible) < self._below.ntotal
        if allowed is not None:
            places = self._places(allowed)
            found = Selection(places[state.visible.holds(places)])
            places, scores = self._below.search(vectors, n_docs, parameters, found)
        elif hides and not self._below.takes_selection:
            places, scores = self._search_past_hidden(state.visible, vectors, n_docs, parameters)
        else:
            places, scores = self._below.search(vectors, n_docs, parameters, state.visible if hides else None)
        if self._rows is None or not places.size:
            return places, scores
        return np.where(places < 0, -1, self._rows[places]), scores

    def _search_past_hidden(
        self, visible: _Visible, vectors: Float32Array, n_docs: int, parameters: SearchParameters
    ) -> tuple[Int64Array, Float32Array]:
        """For a kind that faiss cannot tell what to leave out: finds more, and leaves it out afterwards."""
        num_hidden = self._below.ntotal - len(visible)
        places, scores = self._below.search(vectors, n_docs + num_hidden, parameters)
        dropped = (places < 0) | ~visible.holds(places)
        order = np.argsort(dropped, axis=1, kind="stable")[:, :n_docs]
        places = np.where(dropped, -1, places)
        return np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)

    def _places(self, rows: Int64Array) -> Int64Array:
        """Returns where the snapshot holds these rows; those that it does not hold are left out."""
        if self._rows is None:
            return rows[rows < self._below.ntotal]
        places = np.searchsorted(self._rows, rows)
        places = np.minimum(places, len(self._rows) - 1)
        held: Int64Array = places[self._rows[places] == rows]
        return held
