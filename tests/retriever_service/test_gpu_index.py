"""An index on GPUs, which here are played: what goes there, what stays on the CPU, and that answers are the same."""

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import pytest

from retriever_service.index.faiss_index import FaissBuilder, FaissIndex
from retriever_service.index.fallback import IndexFallback, SearchFallback
from retriever_service.index.gpu.copy import GpuOptions
from retriever_service.index.gpu.index import GpuIndex
from retriever_service.index.gpu.pool import GpuPool
from retriever_service.index.live_index import LiveIndex
from retriever_service.types import Metric, SearchParameters, Selection
from tests.retriever_service.fake_gpus import FakeGpus

DIM = 16
VECTORS = np.random.default_rng(1).standard_normal((2000, DIM)).astype(np.float32)
QUESTIONS = np.random.default_rng(2).standard_normal((20, DIM)).astype(np.float32)
OWN = SearchParameters()


@functools.cache
def built(kind: str) -> FaissIndex:
    # faiss has second codes ("PQ8+8") for L2 alone.
    builder = FaissBuilder(kind, DIM, Metric.L2 if "+" in kind else Metric.INNER_PRODUCT)
    if builder.needs_training:
        builder.train(VECTORS)
    builder.add(VECTORS)
    return FaissIndex(builder._index)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    return FakeGpus().install(monkeypatch)


@pytest.fixture
def fallbacks() -> list[SearchFallback]:
    """Why searches went to the CPU, in their order."""
    return []


@pytest.fixture
def pool(fallbacks: list[SearchFallback]) -> Iterator[Callable[..., GpuPool]]:
    opened = []

    def open_pool(devices: str = "all", *, temp_memory_bytes: int | None = None, **options: Any) -> GpuPool:
        pool = GpuPool.open(
            devices, GpuOptions(**options), temp_memory_bytes=temp_memory_bytes, fell_back=fallbacks.append
        )
        assert pool is not None
        opened.append(pool)
        return pool

    yield open_pool
    for one in opened:
        one.close()


def placed(pool: GpuPool, kind: str) -> GpuIndex:
    index = pool.place(built(kind))
    assert isinstance(index, GpuIndex)
    return index


@pytest.mark.parametrize(
    "kind", ["Flat", "IVF16,Flat", "IVF16,PQ8", "IVF16,SQ8", "SQfp16", "OPQ8,IVF16,PQ8", "PCA14,IVF16,Flat"]
)
def test_kind_that_faiss_has_on_gpus_is_searched_there(
    gpus: FakeGpus, pool: Callable[..., GpuPool], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        index = placed(pool(), kind)
    assert index.devices == ("cuda:0", "cuda:1")
    assert f"the index is on cuda:0,cuda:1: kind {index.cpu.kind()}" in caplog.text
    np.testing.assert_array_equal(index.search(QUESTIONS, 7, OWN)[0], index.cpu.search(QUESTIONS, 7, OWN)[0])
    assert [one.n_docs for one in gpus.searches] == [7]
    assert index.settings() == index.cpu.settings()
    assert index.fallback is None


@pytest.mark.parametrize(
    ("kind", "named", "reason"),
    [
        ("HNSW8", "HNSW8", "faiss has no IndexHNSWFlat on GPUs"),
        ("PQ8", "PQ8", "faiss has no IndexPQ on GPUs"),
        ("IVF16,PQ8x4fs", "IVF16,PQ8x4fs", "faiss has no IndexIVFPQFastScan on GPUs"),
        ("IVF16,PQ8+8", "IVFPQR", "faiss has no IndexIVFPQR on GPUs"),
        ("IVF16,PQ8,RFlat", "Refine(Flat)", "faiss has no IndexRefineFlat on GPUs"),
    ],
)
def test_kind_that_faiss_lacks_on_gpus_stays_on_the_cpu_and_one_line_says_why(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    kind: str,
    named: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cpu = built(kind)
    with caplog.at_level(logging.INFO):
        index = pool().place(cpu)
    assert index is cpu
    assert index.devices == ("cpu",)
    assert index.fallback is IndexFallback.KIND
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert named in caplog.text
    assert reason in caplog.text
    assert not gpus.options


@pytest.mark.parametrize(
    ("num_gpus", "devices", "reason"),
    [(0, "all", "faiss finds no GPU"), (1, "0,cuda:3", "there is no cuda:3: faiss finds 1 GPUs")],
)
def test_gpus_that_are_not_there_leave_indexes_on_the_cpu_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_gpus: int,
    devices: str,
    reason: str,
) -> None:
    FakeGpus(num_gpus=num_gpus).install(monkeypatch)
    assert GpuPool.open(devices, GpuOptions(), temp_memory_bytes=None, fell_back=print) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"indexes stay on the CPU: --index-devices {devices}: {reason}"
    ]


def test_faiss_without_gpu_code_is_named(caplog: pytest.LogCaptureFixture) -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU code")
    assert GpuPool.open("0", GpuOptions(), temp_memory_bytes=None, fell_back=print) is None
    assert "this faiss has no GPU code: install ragpair[gpu]" in caplog.text


def test_index_is_put_on_the_gpus_that_are_named_with_their_scratch_memory(
    gpus: FakeGpus, pool: Callable[..., GpuPool]
) -> None:
    index = placed(pool("cuda:1", temp_memory_bytes=1 << 20), "Flat")
    assert index.devices == ("cuda:1",)
    assert gpus.temp_memory == [1 << 20]
    index.search(QUESTIONS, 1, OWN)
    assert [one.device for one in gpus.searches] == [1]


def test_searches_at_once_go_to_different_gpus_each_in_its_own_thread(
    gpus: FakeGpus, pool: Callable[..., GpuPool]
) -> None:
    index = placed(pool(), "Flat")
    assert index.parallel_searches == 2
    # Neither search ends before the other has begun on its GPU.
    gpus.meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as callers:
        for _ in range(5):
            list(callers.map(lambda _: index.search(QUESTIONS, 3, OWN), range(2)))
    gpus.meeting = None
    index.close()
    assert sorted(one.device for one in gpus.searches) == [0] * 5 + [1] * 5
    assert [len(gpus.threads[number]) for number in (0, 1)] == [1, 1]
    assert gpus.threads[0].isdisjoint(gpus.threads[1])


def test_generations_on_one_gpu_share_its_thread(gpus: FakeGpus, pool: Callable[..., GpuPool]) -> None:
    one_pool = pool("0")
    indexes = [placed(one_pool, "Flat"), placed(one_pool, "IVF16,Flat")]
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda number: indexes[number % 2].search(QUESTIONS, 3, OWN), range(20)))
    for index in indexes:
        index.close()
    assert len(gpus.threads[0]) == 1
    assert gpus.on_device == {0: 0}


def test_shards_are_one_index_on_all_gpus(gpus: FakeGpus, pool: Callable[..., GpuPool]) -> None:
    gpus.vectors_that_fit = len(VECTORS) // 2
    index = placed(pool(sharding=True), "IVF16,Flat")
    assert index.devices == ("cuda:0", "cuda:1")
    assert index.parallel_searches == 1
    assert gpus.on_device == {0: 1000, 1: 1000}
    np.testing.assert_array_equal(index.search(QUESTIONS, 7, OWN)[0], index.cpu.search(QUESTIONS, 7, OWN)[0])


def test_shards_of_a_kind_that_faiss_would_leave_on_the_cpu_are_refused(
    gpus: FakeGpus, pool: Callable[..., GpuPool], caplog: pytest.LogCaptureFixture
) -> None:
    index = pool(sharding=True).place(built("SQfp16"))
    assert isinstance(index, FaissIndex)
    assert "faiss has no IndexScalarQuantizer on GPUs" in caplog.text


def test_nprobe_of_one_request_reaches_the_gpu(gpus: FakeGpus, pool: Callable[..., GpuPool]) -> None:
    for kind in ("IVF16,Flat", "OPQ8,IVF16,PQ8"):
        index = placed(pool("0"), kind)
        for nprobe in (1, 16):
            wanted = SearchParameters(nprobe=nprobe)
            np.testing.assert_array_equal(
                index.search(QUESTIONS, 9, wanted)[0], index.cpu.search(QUESTIONS, 9, wanted)[0]
            )
    assert [getattr(one.params, "nprobe", None) for one in gpus.searches[:2]] == [1, 16]
    assert len(gpus.searches) == 4


def test_float16_is_asked_for_and_its_scores_are_not_called_exact(
    gpus: FakeGpus, pool: Callable[..., GpuPool]
) -> None:
    exact, rounded = placed(pool("0"), "Flat"), placed(pool("0", float16=True), "Flat")
    assert [one.useFloat16 for one in gpus.options] == [False, True]
    assert (exact.has_exact_scores, exact.is_exhaustive) == (True, True)
    assert (rounded.has_exact_scores, rounded.is_exhaustive) == (False, False)


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat"])
def test_narrow_selection_is_searched_on_the_cpu_with_the_same_answer(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    kind: str,
    fallbacks: list[SearchFallback],
) -> None:
    index = placed(pool("0"), kind)
    few = np.arange(0, 2000, 5)
    rows, _ = index.search(QUESTIONS, 5, OWN, Selection(few))
    np.testing.assert_array_equal(rows, index.cpu.search(QUESTIONS, 5, OWN, Selection(few))[0])
    assert not gpus.searches
    assert fallbacks == [SearchFallback.SELECTION]


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat"])
def test_rows_hidden_by_changes_are_dropped_from_what_a_gpu_finds(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    kind: str,
    fallbacks: list[SearchFallback],
) -> None:
    index = placed(pool("0"), kind)
    live, reference = LiveIndex(index, None), LiveIndex(index.cpu, None)
    hidden = np.unique(index.cpu.search(QUESTIONS, 2, OWN)[0]).tolist()
    for one in (live, reference):
        one.change(hidden, [], np.empty((0, DIM), np.float32))
    rows, scores = live.search(QUESTIONS, 5, OWN)
    expected_rows, expected_scores = reference.search(QUESTIONS, 5, OWN)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert [one.n_docs for one in gpus.searches] == [5 + min(len(hidden), 5 + 32)]
    assert live.devices == ("cuda:0",)
    assert not fallbacks


def test_search_that_hidden_rows_leave_short_is_done_again_on_the_cpu(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    fallbacks: list[SearchFallback],
) -> None:
    """All that a GPU was asked for may be hidden: then it has not looked far enough."""
    index = placed(pool("0"), "Flat")
    hidden = index.cpu.search(QUESTIONS[:1], 100, OWN)[0][0]
    live = LiveIndex(index, None)
    live.change(hidden.tolist(), [], np.empty((0, DIM), np.float32))
    rows, _ = live.search(QUESTIONS[:1], 5, OWN)
    np.testing.assert_array_equal(rows[0], index.cpu.search(QUESTIONS[:1], 105, OWN)[0][0, 100:])
    assert [one.n_docs for one in gpus.searches] == [42]
    assert fallbacks == [SearchFallback.TOO_FEW_LEFT]


def test_more_candidates_than_a_gpu_selects_are_the_cpus(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    fallbacks: list[SearchFallback],
) -> None:
    rows, _ = placed(pool("0"), "Flat").search(QUESTIONS, 1500, OWN)
    assert rows.shape == (20, 1500)
    assert not gpus.searches
    assert fallbacks == [SearchFallback.CANDIDATES]


def test_search_that_a_gpu_fails_is_answered_by_the_cpu_and_said_once(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    caplog: pytest.LogCaptureFixture,
    fallbacks: list[SearchFallback],
) -> None:
    index = placed(pool("0"), "Flat")
    gpus.search_error = RuntimeError("Error in f at /x/y.cpp:1: out of memory")
    for _ in range(3):
        np.testing.assert_array_equal(
            index.search(QUESTIONS, 7, OWN)[0], index.cpu.search(QUESTIONS, 7, OWN)[0]
        )
    assert [record.getMessage() for record in caplog.records] == [
        "a search on cuda:0 failed, the CPU answers (said once an index): kind Flat: out of memory"
    ]
    gpus.search_error = None
    index.search(QUESTIONS, 7, OWN)
    assert len(gpus.searches) == 4
    assert fallbacks == [SearchFallback.FAILED] * 3


def test_index_that_finds_no_memory_stays_on_the_cpu_until_another_leaves(
    gpus: FakeGpus, pool: Callable[..., GpuPool], caplog: pytest.LogCaptureFixture
) -> None:
    """After a compaction the old generation's copy leaves last: without another try, the new one would never come."""
    gpus.vectors_that_fit = 3000
    one_pool = pool()
    old, new = placed(one_pool, "Flat"), placed(one_pool, "IVF16,Flat")
    assert "the index stays on the CPU: kind IVF16,Flat: cuda:0: " in caplog.text
    assert "out of memory; cuda:1: " in caplog.text
    assert (old.devices, new.devices) == (("cuda:0", "cuda:1"), ("cpu",))
    np.testing.assert_array_equal(new.search(QUESTIONS, 7, OWN)[0], new.cpu.search(QUESTIONS, 7, OWN)[0])
    assert (old.fallback, new.fallback) == (None, IndexFallback.COPY_FAILED)
    assert LiveIndex(new, None).fallback is IndexFallback.COPY_FAILED
    old.close()
    assert new.fallback is None
    assert (old.devices, new.devices) == (("cpu",), ("cuda:0", "cuda:1"))
    assert gpus.on_device == {0: 2000, 1: 2000}
    np.testing.assert_array_equal(old.search(QUESTIONS, 7, OWN)[0], old.cpu.search(QUESTIONS, 7, OWN)[0])


def test_index_is_on_the_gpus_that_have_room(
    gpus: FakeGpus, pool: Callable[..., GpuPool], caplog: pytest.LogCaptureFixture
) -> None:
    gpus.vectors_that_fit = 3000
    gpus.on_device[1] = 2500
    index = placed(pool(), "Flat")
    assert index.devices == ("cuda:0",)
    assert "the index is not on every GPU: kind Flat: cuda:1: " in caplog.text


@pytest.mark.parametrize("kind", ["Flat", "HNSW8"])
def test_cagra_graph_is_built_of_whole_vectors_where_faiss_has_it(
    gpus: FakeGpus, pool: Callable[..., GpuPool], kind: str
) -> None:
    gpus.has_cuvs = True
    index = placed(pool("0", cagra=True), kind)
    assert (index.devices, index.has_exact_scores, index.is_exhaustive) == (("cuda:0",), True, False)
    truth = np.argsort(-(QUESTIONS @ VECTORS.T), axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(index.search(QUESTIONS, 100, OWN)[0], truth)
    if kind == "HNSW8":
        index.search(QUESTIONS, 10, SearchParameters(ef_search=200))
        assert gpus.searches[-1].params.itopk_size == 200


@pytest.mark.parametrize(
    ("options", "has_cuvs", "reason"),
    [
        ({"cagra": True}, False, "CAGRA needs faiss with cuVS"),
        ({"cagra": True, "sharding": True}, True, "CAGRA cannot be split over GPUs"),
    ],
)
def test_cagra_that_faiss_cannot_make_leaves_the_index_on_the_cpu(
    gpus: FakeGpus,
    pool: Callable[..., GpuPool],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, bool],
    has_cuvs: bool,
    reason: str,
) -> None:
    gpus.has_cuvs = has_cuvs
    assert isinstance(pool(**options).place(built("HNSW8")), FaissIndex)
    assert f"the index stays on the CPU: kind HNSW8: {reason}" in caplog.text


def test_vectors_of_another_shape_never_reach_a_gpu(gpus: FakeGpus, pool: Callable[..., GpuPool]) -> None:
    index = placed(pool("0"), "Flat")
    with pytest.raises(ValueError, match="cannot search"):
        index.search(np.zeros((2, DIM + 1), np.float32), 5, OWN)
    assert not gpus.searches
