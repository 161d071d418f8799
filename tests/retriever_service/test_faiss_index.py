"""The faiss index behind the contract of VectorIndex."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from retriever_service.errors import BuildError, DamagedIndexError, InvalidSearchParametersError
from retriever_service.index import faiss_index
from retriever_service.index.faiss_index import (
    FaissBuilder,
    FaissIndex,
    ask_nobody_to_stop,
    default_num_threads,
    multiply_batches,
    normalized_kind,
    set_num_threads,
)
from retriever_service.index.faiss_parts import find_part
from retriever_service.types import Metric, SearchParameters

DIM = 16
VECTORS = np.random.default_rng(1).standard_normal((600, DIM)).astype(np.float32)
QUESTIONS = np.random.default_rng(2).standard_normal((20, DIM)).astype(np.float32)


def built(tmp_path: Path, kind: str, metric: Metric = Metric.INNER_PRODUCT) -> FaissIndex:
    builder = FaissBuilder(kind, DIM, metric)
    if builder.needs_training:
        builder.train(VECTORS)
    builder.add(VECTORS)
    builder.save(tmp_path / "index.faiss", nprobe=4, ef_search=64)
    return FaissIndex.load(tmp_path / "index.faiss")


def recall(index: FaissIndex, parameters: SearchParameters, n_docs: int = 5) -> float:
    rows, _ = index.search(QUESTIONS, n_docs, parameters)
    best = np.argsort(-(QUESTIONS @ VECTORS.T), axis=1)[:, :n_docs]
    return float(np.mean([len(set(a) & set(b)) / n_docs for a, b in zip(rows, best, strict=True)]))


@pytest.mark.parametrize("metric", list(Metric))
def test_flat_index_finds_what_numpy_finds(tmp_path: Path, metric: Metric) -> None:
    index = built(tmp_path, "Flat", metric)
    rows, scores = index.search(QUESTIONS, 7, SearchParameters())
    if metric is Metric.INNER_PRODUCT:
        expected = QUESTIONS @ VECTORS.T
        order = np.argsort(-expected, axis=1)[:, :7]
    else:
        expected = ((QUESTIONS[:, None] - VECTORS[None]) ** 2).sum(-1)
        order = np.argsort(expected, axis=1)[:, :7]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), rtol=1e-4, atol=1e-4)
    assert (index.ntotal, index.dimension, index.metric, index.kind()) == (600, DIM, metric, "Flat")


@pytest.mark.parametrize(
    "kind", ["IVF8,Flat", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4", "IVF8_HNSW4,Flat", "IVF8,SQ8,RFlat"]
)
def test_nprobe_of_one_request_widens_its_search_and_leaves_the_index_alone(
    tmp_path: Path, kind: str
) -> None:
    index = built(tmp_path, kind)
    own = index.search(QUESTIONS, 5, SearchParameters())[0]
    narrow, wide = recall(index, SearchParameters(nprobe=1)), recall(index, SearchParameters(nprobe=8))
    assert wide > narrow
    np.testing.assert_array_equal(index.search(QUESTIONS, 5, SearchParameters())[0], own)


def test_ef_search_of_one_request_widens_its_search_and_leaves_the_index_alone(tmp_path: Path) -> None:
    index = built(tmp_path, "HNSW8")
    own = index.search(QUESTIONS, 5, SearchParameters())[0]
    assert recall(index, SearchParameters(ef_search=1)) < recall(index, SearchParameters(ef_search=300))
    np.testing.assert_array_equal(index.search(QUESTIONS, 5, SearchParameters())[0], own)


@pytest.mark.parametrize(
    ("kind", "parameters", "field"),
    [
        ("Flat", SearchParameters(nprobe=1), "search_parameters.nprobe"),
        ("Flat", SearchParameters(ef_search=1), "search_parameters.ef_search"),
        ("HNSW8", SearchParameters(nprobe=1), "search_parameters.nprobe"),
        ("IVF8,Flat", SearchParameters(ef_search=1), "search_parameters.ef_search"),
        ("IVF8,Flat", SearchParameters(nprobe=9), "search_parameters.nprobe"),
        ("IVF8,Flat", SearchParameters(nprobe=-1), "search_parameters.nprobe"),
    ],
)
def test_knob_that_a_kind_lacks_is_refused_by_name(
    tmp_path: Path, kind: str, parameters: SearchParameters, field: str
) -> None:
    with pytest.raises(InvalidSearchParametersError) as caught:
        built(tmp_path, kind).check_parameters(parameters)
    assert caught.value.violations[0].field == field


def test_more_documents_than_vectors_gives_all_vectors(tmp_path: Path) -> None:
    rows, scores = built(tmp_path, "Flat").search(QUESTIONS, 1000, SearchParameters())
    assert rows.shape == scores.shape == (20, 600)
    assert (rows >= 0).all()


def test_missing_hits_are_minus_one_and_stand_last(tmp_path: Path) -> None:
    index = built(tmp_path, "IVF64,Flat")
    rows, _ = index.search(QUESTIONS, 100, SearchParameters(nprobe=1))
    missing = rows < 0
    assert missing.any()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("shape", [(0, DIM), (2, DIM + 1), (DIM,)])
def test_vectors_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot search"):
        built(tmp_path, "Flat").search(np.zeros(shape, np.float32), 5, SearchParameters())


@pytest.mark.parametrize("kind", ["Nonsense", "IVF8,PQ5", ""])
def test_factory_string_that_faiss_refuses_is_a_clear_error(kind: str) -> None:
    with pytest.raises(BuildError, match="faiss refuses kind"):
        FaissBuilder(kind, DIM, Metric.INNER_PRODUCT)


@pytest.mark.parametrize(
    "kind", ["HNSW0", "HNSW1", "HNSW00_SQ8", "IVF4_HNSW0,Flat", "IVF0,Flat", "IVF0_HNSW8,Flat"]
)
def test_kinds_that_end_the_process_or_cannot_be_searched_are_refused(kind: str) -> None:
    with pytest.raises(BuildError, match="needs"):
        FaissBuilder(kind, DIM, Metric.INNER_PRODUCT)


@pytest.mark.parametrize(("kind", "added"), [("IDMap,Flat", 0), ("NSG16,Flat", 300)])
def test_a_kind_that_takes_no_more_vectors_is_a_clear_error(kind: str, added: int) -> None:
    builder = FaissBuilder(kind, DIM, Metric.L2)
    with pytest.raises(BuildError, match=f"takes no vectors after the first {added}"):  # noqa: PT012
        builder.add(VECTORS[:300])
        builder.add(VECTORS[300:])


def test_too_few_vectors_to_train_is_a_clear_error() -> None:
    with pytest.raises(BuildError, match="cannot be trained on 3 vectors"):
        FaissBuilder("IVF8,Flat", DIM, Metric.L2).train(VECTORS[:3])


def test_file_that_is_no_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.faiss").write_bytes(b"not an index at all")
    with pytest.raises(DamagedIndexError, match=r"index\.faiss: faiss cannot read it"):
        FaissIndex.load(tmp_path / "index.faiss")


@pytest.mark.parametrize(
    ("given", "spelled"),
    [("flat", "Flat"), ("hnsw", "HNSW32"), ("hnsw16", "HNSW16"), ("IVF8,Flat", "IVF8,Flat")],
)
def test_small_names_of_kinds_are_understood(given: str, spelled: str) -> None:
    assert normalized_kind(given) == spelled


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("count", [1, 600])
def test_a_disk_that_fills_while_an_index_is_written_is_an_error(count: int) -> None:
    """faiss's own writer told nothing of a disk that was full for the last 4 KB: the file was cut, and published."""
    builder = FaissBuilder("Flat", DIM, Metric.L2)
    builder.add(VECTORS[:count])
    with pytest.raises(OSError, match="No space left"):
        builder.save(Path("/dev/full"), nprobe=1, ef_search=1)


@pytest.fixture
def faiss_settings() -> Iterator[Any]:
    """faiss's settings of this process, put back afterwards; it asks whether to stop, whoever has served before."""
    faiss.PythonInterruptCallback.reset()  # type: ignore[attr-defined]  # not in its stubs
    found: Any = faiss.cvar  # type: ignore[attr-defined]  # not in its stubs
    names = ("threshold", "query_bs", "database_bs")
    before = {
        f"distance_compute_blas_{name}": getattr(found, f"distance_compute_blas_{name}") for name in names
    }
    threads = default_num_threads()
    yield found
    set_num_threads(threads)
    for name, value in before.items():
        setattr(found, name, value)
    faiss.PythonInterruptCallback.reset()  # type: ignore[attr-defined]


@pytest.mark.parametrize("metric", list(Metric))
def test_multiplied_batch_has_the_rows_that_its_questions_have_alone(
    tmp_path: Path, metric: Metric, faiss_settings: Any
) -> None:
    index = built(tmp_path, "Flat", metric)
    set_num_threads(2)
    alone = [index.search(QUESTIONS[at : at + 1], 7, SearchParameters()) for at in range(len(QUESTIONS))]
    faiss_settings.distance_compute_blas_threshold = 1
    rows, scores = index.search(QUESTIONS, 7, SearchParameters())
    np.testing.assert_array_equal(rows, np.concatenate([found for found, _ in alone]))
    np.testing.assert_allclose(scores, np.concatenate([found for _, found in alone]), rtol=1e-4, atol=1e-4)


def test_nothing_is_asked_in_the_middle_of_a_search(faiss_settings: Any) -> None:
    callback: Any = faiss.InterruptCallback  # type: ignore[attr-defined]  # not in its stubs
    asked_each_time = callback.get_period_hint(1000)
    ask_nobody_to_stop()
    assert callback.get_period_hint(1000) == 1 << 30 != asked_each_time


def test_few_threads_multiply_small_batches_and_many_leave_it_to_faiss(faiss_settings: Any) -> None:
    for threads, questions in ((1, 8), (2, 16), (8, 64)):
        multiply_batches(threads)
        assert faiss_settings.distance_compute_blas_threshold == questions * 384
    multiply_batches(128)
    assert faiss_settings.distance_compute_blas_threshold == faiss_index._FAISS_MULTIPLIES_FROM
    assert (
        faiss_settings.distance_compute_blas_query_bs * faiss_settings.distance_compute_blas_database_bs
        == 4096 * 1024
    )


class Watched:
    """An index of faiss that notes how many threads each search may take."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.threads: list[int] = []

    def search(self, *given: Any, **named: Any) -> Any:
        self.threads.append(default_num_threads())
        return self._index.search(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


@pytest.mark.parametrize(
    ("kind", "threads", "taken"), [("Flat", 3, [1, 2, 3]), ("Flat", 8, [8, 8, 8]), ("HNSW8", 3, [3, 3, 3])]
)
def test_few_questions_take_no_more_of_few_threads_than_they_are(
    tmp_path: Path, kind: str, threads: int, taken: list[int], faiss_settings: Any
) -> None:
    """faiss divided the vectors of a Flat index among two threads, which took twice as long as one of them."""
    index = built(tmp_path, kind)
    watched = Watched(index.faiss_index)
    index._index = watched
    set_num_threads(threads)
    for num_questions in (1, 2, 3):
        index.search(QUESTIONS[:num_questions], 5, SearchParameters())
        assert default_num_threads() == threads
    assert watched.threads == taken


@pytest.mark.parametrize(
    "kind", ["PQ4x4", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4", "IVF4,PQ4x4,RFlat", "HNSW8_PQ4x4"]
)
def test_training_orders_no_codes_and_finds_what_an_ordered_index_finds(kind: str) -> None:
    """faiss orders centroids for searches by Hamming distance, a second for each codebook of 256."""
    vectors = np.random.default_rng(3).standard_normal((300, 16)).astype(np.float32)
    ordered = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    ordered.train(vectors)
    ordered.add(vectors)
    builder = FaissBuilder(kind, 16, Metric.INNER_PRODUCT)
    builder.train(vectors)
    builder.add(vectors)
    parts = [find_part(builder._index, one) for one in (faiss.IndexPQ, faiss.IndexIVFPQ)]
    graph = find_part(builder._index, faiss.IndexHNSW)
    if graph is not None:
        parts.append(faiss.downcast_index(graph.storage))
    assert [part.do_polysemous_training for part in parts if part is not None] == [False]
    for found, wanted in zip(
        builder._index.search(vectors[:9], 5), ordered.search(vectors[:9], 5), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
