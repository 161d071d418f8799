"""The vectors that came after the snapshot: few, in memory, searched exactly."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np
import numpy.typing as npt

from retriever_service.types import Float32Array, Int64Array, Metric

# Vectors of a block. Memory is taken as they come; a search has some 40 µs for each block.
_BLOCK_VECTORS = 8192
# Hidden vectors of a block that a search steps over; with more of them, its living ones move to the last block.
_MAX_HIDDEN = 512


@dataclass(frozen=True, slots=True)
class _Block:
    """Some fresh vectors at one moment: vectors float32 [n, dim], rows int64 [n], hidden bool [n]."""

    vectors: Float32Array
    rows: Int64Array
    hidden: npt.NDArray[np.bool_]
    num_hidden: int

    def search(
        self, questions: Float32Array, n_docs: int, kind: int, allowed: Int64Array | None
    ) -> tuple[Int64Array, Float32Array]:
        """Returns rows and scores [batch, at most n_docs], best first; `kind` is faiss's metric."""
        vectors, rows, hidden, num_hidden = self.vectors, self.rows, self.hidden, self.num_hidden
        if allowed is not None:
            chosen = ~hidden & _are_in(rows, allowed)
            vectors, rows, hidden, num_hidden = vectors[chosen], rows[chosen], hidden[chosen], 0
        wanted = min(len(rows), n_docs + num_hidden)
        if wanted == 0 or len(rows) == num_hidden:
            return np.empty((len(questions), 0), np.int64), np.empty((len(questions), 0), np.float32)
        scores, places = faiss.knn(questions, vectors, wanted, metric=kind)
        if num_hidden:
            # A stable sort moves the hits that are hidden behind the others, which keep their order.
            order = np.argsort(hidden[places] | (places < 0), axis=1, kind="stable")[:, :n_docs]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        missing = (places < 0) | hidden[places]
        return np.where(missing, -1, rows[places]), scores


@dataclass(frozen=True, slots=True)
class FreshVectors:
    """The fresh vectors at one moment."""

    blocks: tuple[_Block, ...] = ()

    def __len__(self) -> int:
        """Vectors held, those that are hidden too."""
        return sum(len(block.rows) for block in self.blocks)

    @property
    def num_living(self) -> int:
        """Vectors that can be found."""
        return sum(len(block.rows) - block.num_hidden for block in self.blocks)

    def search(
        self, questions: Float32Array, n_docs: int, metric: Metric, allowed: Int64Array | None
    ) -> tuple[Int64Array, Float32Array]:
        """Returns rows int64 and scores float32 [batch, blocks' together], -1 for missing hits, in no order.

        The best n_docs are among them. Scores are faiss's: inner products, or squared distances. `allowed` are
        the rows that may be found, ascending.
        """
        kind = faiss.METRIC_INNER_PRODUCT if metric is Metric.INNER_PRODUCT else faiss.METRIC_L2
        found = [block.search(questions, n_docs, kind, allowed) for block in self.blocks]
        rows = [np.empty((len(questions), 0), np.int64), *(rows for rows, _ in found)]
        scores = [np.empty((len(questions), 0), np.float32), *(scores for _, scores in found)]
        return np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)

    def living(self, allowed: Int64Array) -> Int64Array:
        """Returns those of `allowed`, ascending, that can be found, in no order."""
        found = [block.rows[~block.hidden & _are_in(block.rows, allowed)] for block in self.blocks]
        return np.concatenate([np.empty(0, np.int64), *found])


class FreshSegment:
    """Grows and hides; every change makes a new `now`, and what was taken before stays as it was.

    One thread changes it at a time. Vectors are appended to a block's memory, whose filled part is never touched
    again, and to a new block once it is full: what a change costs depends on its size, not on the segment's.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._blocks: dict[int, _Block] = {}
        self._next_block = 0
        self._vectors = np.empty((0, dimension), dtype=np.float32)
        self._rows = np.empty(0, np.int64)
        # Of a row that is found: its block's number times _BLOCK_VECTORS, and its place in the block.
        self._places: dict[int, int] = {}
        self.now = FreshVectors()

    def change(self, hidden_rows: Sequence[int], rows: Sequence[int], vectors: Float32Array) -> FreshVectors:
        """Returns the vectors without `hidden_rows`, which are here, and with float32 [len(rows), dim] more."""
        places: defaultdict[int, list[int]] = defaultdict(list)
        for row in hidden_rows:
            block, place = divmod(self._places.pop(row), _BLOCK_VECTORS)
            places[block].append(place)
        for block, hiding in places.items():
            self._hide(block, hiding)
        self._append(np.asarray(rows, np.int64), vectors)
        for block in places:
            if self._blocks[block].num_hidden > _MAX_HIDDEN:
                self._move_living(block)
        self.now = FreshVectors(tuple(self._blocks.values()))
        return self.now

    def holds(self, row: int) -> bool:
        """Whether the row is here and not hidden."""
        return row in self._places

    def _hide(self, block: int, places: list[int]) -> None:
        before = self._blocks[block]
        hidden = before.hidden.copy()
        hidden[places] = True
        self._blocks[block] = replace(before, hidden=hidden, num_hidden=before.num_hidden + len(places))

    def _append(self, rows: Int64Array, vectors: Float32Array) -> None:
        while len(rows):
            last = self._next_block - 1
            filled = len(self._blocks[last].rows) if last in self._blocks else _BLOCK_VECTORS
            if filled == _BLOCK_VECTORS:
                self._begin_block()
                continue
            taken = min(len(rows), _BLOCK_VECTORS - filled)
            self._vectors[filled : filled + taken] = vectors[:taken]
            self._rows[filled : filled + taken] = rows[:taken]
            before = self._blocks[last]
            self._blocks[last] = _Block(
                self._vectors[: filled + taken],
                self._rows[: filled + taken],
                np.concatenate([before.hidden, np.zeros(taken, np.bool_)]),
                before.num_hidden,
            )
            first = last * _BLOCK_VECTORS + filled
            self._places.update(zip(rows[:taken].tolist(), range(first, first + taken), strict=True))
            rows, vectors = rows[taken:], vectors[taken:]

    def _begin_block(self) -> None:
        self._vectors = np.empty((_BLOCK_VECTORS, self._dimension), dtype=np.float32)
        self._rows = np.empty(_BLOCK_VECTORS, np.int64)
        self._blocks[self._next_block] = _Block(self._vectors[:0], self._rows[:0], np.empty(0, np.bool_), 0)
        self._next_block += 1

    def _move_living(self, block: int) -> None:
        left = self._blocks.pop(block)
        living = np.flatnonzero(~left.hidden)
        self._append(left.rows[living], left.vectors[living])


def _are_in(rows: Int64Array, allowed: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each of the rows is one of `allowed`, which ascend."""
    if not len(allowed):
        return np.zeros(len(rows), np.bool_)
    places = np.minimum(np.searchsorted(allowed, rows), len(allowed) - 1)
    found: npt.NDArray[np.bool_] = allowed[places] == rows
    return found
