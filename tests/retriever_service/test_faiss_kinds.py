"""Every composition that the documentation names: found, selected, mapped, re-scored."""

import logging
from pathlib import Path

import faiss
import numpy as np
import pytest

from retriever_service.index.faiss_index import FaissBuilder, FaissIndex
from retriever_service.types import Metric, SearchParameters, Selection

DIM = 16
VECTORS = np.random.default_rng(1).standard_normal((2000, DIM)).astype(np.float32)
QUESTIONS = np.random.default_rng(2).standard_normal((20, DIM)).astype(np.float32)
OWN = SearchParameters()

# (kind, exact scores, takes a selection)
KINDS = [
    ("Flat", True, True),
    ("HNSW16", True, True),
    ("HNSW16,SQ8", False, True),
    ("IVF16,Flat", True, True),
    ("IVF16_HNSW8,Flat", True, True),
    ("IVF16,PQ8", False, True),
    ("OPQ8,IVF16,PQ8", False, True),
    ("IVF16,PQ8x4fs", False, True),
    ("IVF16,PQ8,RFlat", True, True),
    ("IVF16,SQ8", False, True),
    ("SQ8", False, True),
    ("SQfp16", False, True),
    ("PCA14,SQ8", False, True),
    ("PQ8", False, False),
    ("PQ8x4fs", False, False),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    built = {}
    for number, (kind, _, _) in enumerate(KINDS):
        builder = FaissBuilder(kind, DIM, Metric.INNER_PRODUCT)
        if builder.needs_training:
            builder.train(VECTORS)
        builder.add(VECTORS)
        built[kind] = folder / f"{number}.faiss"
        builder.save(built[kind], nprobe=8, ef_search=64)
    return built


def best(n_docs: int, rows: np.ndarray | None = None) -> np.ndarray:
    scores = QUESTIONS @ VECTORS.T
    if rows is not None:
        left_out = np.ones(len(VECTORS), dtype=bool)
        left_out[rows] = False
        scores[:, left_out] = -np.inf
    return np.argsort(-scores, axis=1)[:, :n_docs]


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([np.isin(two, one).mean() for one, two in zip(found, wanted, strict=True)]))


@pytest.mark.parametrize(("kind", "exact_scores", "takes_selection"), KINDS)
def test_kind_finds_the_nearest_and_says_what_it_can(
    files: dict[str, Path], kind: str, exact_scores: bool, takes_selection: bool
) -> None:
    index = FaissIndex.load(files[kind])
    assert (index.has_exact_scores, index.takes_selection) == (exact_scores, takes_selection)
    assert index.is_exhaustive == (kind == "Flat")
    rows, scores = index.search(QUESTIONS, 40, OWN)
    assert recall(rows, best(4)) > 0.75
    if exact_scores:
        np.testing.assert_allclose(
            scores, np.einsum("bd,bnd->bn", QUESTIONS, VECTORS[rows]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", [kind for kind, _, takes_selection in KINDS if takes_selection])
def test_selection_is_all_that_a_search_can_find(files: dict[str, Path], kind: str) -> None:
    index = FaissIndex.load(files[kind])
    chosen = np.arange(0, len(VECTORS), 3)
    rows, _ = index.search(QUESTIONS, 30, OWN, Selection(chosen))
    assert np.isin(rows, [-1, *chosen]).all()
    assert recall(rows, best(3, chosen)) > 0.7
    few, _ = index.search(QUESTIONS, 30, OWN, Selection(np.array([7, 1999])))
    assert few.shape == (20, 2)
    assert np.isin(few, [-1, 7, 1999]).all()
    none, _ = index.search(QUESTIONS, 30, OWN, Selection(np.empty(0, np.int64)))
    assert none.shape == (20, 0)


@pytest.mark.parametrize("kind", [kind for kind, _, _ in KINDS])
def test_mapped_index_answers_as_the_one_in_memory(files: dict[str, Path], kind: str) -> None:
    mapped, read = FaissIndex.load(files[kind], memory_map=True), FaissIndex.load(files[kind])
    np.testing.assert_array_equal(mapped.search(QUESTIONS, 10, OWN)[0], read.search(QUESTIONS, 10, OWN)[0])


def test_kind_that_cannot_be_mapped_is_read_and_the_log_says_so(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = faiss.read_index

    def refusing(name: str, flags: int = 0) -> object:
        if flags:
            raise RuntimeError("Error in f at /x/index_read.cpp:1: mmap is not supported here")
        return read(name)

    monkeypatch.setattr(faiss, "read_index", refusing)
    with caplog.at_level(logging.WARNING):
        index = FaissIndex.load(files["Flat"], memory_map=True)
    assert index.ntotal == len(VECTORS)
    assert "cannot map" in caplog.text
