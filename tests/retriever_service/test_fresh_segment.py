"""The fresh segment beside a snapshot: exact at every size, and what a search has taken stays as it was."""

import numpy as np
import pytest

from retriever_service.index import fresh_segment
from retriever_service.index.fresh_segment import FreshSegment, FreshVectors
from retriever_service.types import Float32Array, Int64Array, Metric

DIM = 8


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_segment, "_BLOCK_VECTORS", 16)
    monkeypatch.setattr(fresh_segment, "_MAX_HIDDEN", 4)


def best(
    fresh: FreshVectors, questions: Float32Array, n_docs: int, metric: Metric, allowed: Int64Array | None
) -> list[list[int]]:
    """The rows of the n_docs best for each question."""
    rows, scores = fresh.search(questions, n_docs, metric, allowed)
    far = scores if metric is Metric.L2 else -scores
    order = np.argsort(np.where(rows < 0, np.inf, far), axis=1, kind="stable")[:, :n_docs]
    return [[row for row in found if row >= 0] for found in np.take_along_axis(rows, order, 1).tolist()]


def expected(
    living: dict[int, Float32Array], questions: Float32Array, n_docs: int, metric: Metric
) -> list[list[int]]:
    if not living:
        return [[] for _ in questions]
    rows, vectors = np.asarray(list(living)), np.stack(list(living.values()))
    if metric is Metric.L2:
        far = np.square(questions[:, None] - vectors[None]).sum(axis=2)
    else:
        far = -(questions @ vectors.T)
    return [rows[order].tolist() for order in np.argsort(far, axis=1)[:, :n_docs]]


@pytest.mark.parametrize("metric", list(Metric))
def test_any_changes_find_what_an_exact_search_of_what_is_left_finds(metric: Metric) -> None:
    random = np.random.default_rng(0)
    segment, living, next_row = FreshSegment(DIM), dict[int, Float32Array](), 100
    questions = random.standard_normal((3, DIM)).astype(np.float32)
    taken: list[tuple[FreshVectors, dict[int, Float32Array]]] = []
    for _ in range(120):
        gone = random.permutation(list(living))[: int(random.integers(0, 12))].tolist()
        rows = list(range(next_row, next_row + int(random.integers(0, 25))))
        next_row += len(rows)
        vectors = random.standard_normal((len(rows), DIM)).astype(np.float32)
        now = segment.change(gone, rows, vectors)
        living = {row: vector for row, vector in living.items() if row not in gone}
        living |= dict(zip(rows, vectors, strict=True))
        assert now.num_living == len(living)
        assert all(segment.holds(row) for row in living)
        assert not any(segment.holds(row) for row in gone)
        taken.append((now, living))
    assert len(living) > 10 * 16
    for now, then in taken:
        assert best(now, questions, 5, metric, None) == expected(then, questions, 5, metric)
        allowed = np.asarray([row for row in then if row % 3 == 0], np.int64)
        few = {row: then[row] for row in allowed.tolist()}
        assert best(now, questions, 5, metric, allowed) == expected(few, questions, 5, metric)
        assert sorted(now.living(np.asarray([1, *allowed, 10**6]))) == sorted(few)


def test_hidden_vectors_do_not_pile_up() -> None:
    """One key written over and over holds some blocks' memory, not a vector for each time."""
    segment, vector = FreshSegment(DIM), np.ones((1, DIM), np.float32)
    segment.change([], [0], vector)
    for row in range(1, 1000):
        segment.change([row - 1], [row], vector)
        assert segment.now.num_living == 1
        assert len(segment.now) <= 16 + 4


def test_an_empty_segment_and_one_of_hidden_vectors_alone_find_nothing() -> None:
    segment, questions = FreshSegment(DIM), np.ones((2, DIM), np.float32)
    assert segment.now.search(questions, 5, Metric.L2, None)[0].shape == (2, 0)
    segment.change([], [7], np.ones((1, DIM), np.float32))
    segment.change([7], [], np.empty((0, DIM), np.float32))
    assert best(segment.now, questions, 5, Metric.L2, None) == [[], []]
    assert best(segment.now, questions, 5, Metric.L2, np.asarray([7])) == [[], []]


def test_vectors_that_none_may_find_are_left_out() -> None:
    segment = FreshSegment(DIM)
    segment.change([], [7, 9], np.ones((2, DIM), np.float32))
    assert best(segment.now, np.ones((1, DIM), np.float32), 5, Metric.L2, np.empty(0, np.int64)) == [[]]
