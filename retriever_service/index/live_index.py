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
    """All of a snapshot's vectors but the hidden ones, as bits; `hidden` is bool [ntotal]."""

    def __init__(self, hidden: npt.NDArray[np.bool_], num_hidden: int) -> None:
        super().__init__(np.empty(0, np.int64))
        self._num_visible = len(hidden) - num_hidden
        self._bitmap = np.packbits(~hidden, bitorder="little")

    def __len__(self) -> int:
        return self._num_visible


@dataclass(frozen=True, slots=True)
class _State:
    """What a search sees: the snapshot's places that are hidden (a set too few to matter, or as bits)."""

    hidden: npt.NDArray[np.bool_]
    num_hidden: int
    visible: Selection | None
    fresh: FreshVectors


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
        self._state = _State(np.zeros(base.ntotal, np.bool_), 0, None, self._segment.now)

    @property
    def base(self) -> VectorIndex:
        """The snapshot's index."""
        return self._below

    @property
    def ntotal(self) -> int:
        """Vectors that can be found."""
        state = self._state
        return self._below.ntotal - state.num_hidden + state.fresh.num_living

    @property
    def pending_changes(self) -> int:
        """Vectors hidden or added since the snapshot."""
        state = self._state
        return state.num_hidden + len(state.fresh.rows)

    def change(self, hidden_rows: Sequence[int], rows: Sequence[int], vectors: Float32Array) -> None:
        """Hides rows and adds float32 [len(rows), dim], at once; rows that are not here are hidden already."""
        with self._changing:
            fresh = [row for row in hidden_rows if self._segment.holds(row)]
            built = [row for row in hidden_rows if not self._segment.holds(row)]
            places = self._places(np.asarray(built, np.int64))
            hidden, num_hidden, visible = self._state.hidden, self._state.num_hidden, self._state.visible
            if len(places):
                hidden = hidden.copy()
                hidden[places] = True
                num_hidden = int(hidden.sum())
                visible = _Visible(hidden, num_hidden)
            self._state = _State(hidden, num_hidden, visible, self._segment.change(fresh, rows, vectors))

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
        rows, scores = self._search_base(state, vectors, n_docs, parameters, selection)
        if not len(state.fresh.rows):
            return rows, scores
        questions = np.ascontiguousarray(vectors, dtype=np.float32)
        allowed = None if selection is None else selection.rows
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
        selection: Selection | None,
    ) -> tuple[Int64Array, Float32Array]:
        if selection is not None:
            places = self._places(selection.rows)
            visible: Selection | None = Selection(places[~state.hidden[places]])
        else:
            visible = state.visible
        if visible is None or self._below.takes_selection:
            places, scores = self._below.search(vectors, n_docs, parameters, visible)
        else:
            places, scores = self._search_past_hidden(state, vectors, n_docs, parameters)
        if self._rows is None or not places.size:
            return places, scores
        return np.where(places < 0, -1, self._rows[places]), scores

    def _search_past_hidden(
        self, state: _State, vectors: Float32Array, n_docs: int, parameters: SearchParameters
    ) -> tuple[Int64Array, Float32Array]:
        """For a kind that faiss cannot tell what to leave out: finds more, and leaves it out afterwards."""
        places, scores = self._below.search(vectors, n_docs + state.num_hidden, parameters)
        dropped = (places < 0) | state.hidden[places]
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
