"""Filters, thresholds, re-scoring and live recall: what is searched, and how exactly."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.exact_search import exact_search
from retriever_service.filters import Equal, Filter, Not, OneOf, Range, matches
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Metric, SearchParameters
from tests.retriever_service.test_retriever import DIM, DOCUMENTS, EMBEDDINGS, VECTORS, Retrieving, query
from tests.retriever_service.tiny_models import write_jsonl

Build = Callable[..., Snapshot]


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Snapshot]:
    from tests.retriever_service.conftest import build

    folder = tmp_path_factory.mktemp("search")
    corpus = write_jsonl(folder / "docs.jsonl", DOCUMENTS)
    made: dict[str, Snapshot] = {}

    def snapshot(kind: str, **options: Any) -> Snapshot:
        name = f"{kind} {options}"
        if name not in made:
            made[name] = build(corpus, folder / str(len(made)), kind=kind, **options)
        return made[name]

    return snapshot


def expected(
    vectors: Any, n_docs: int, condition: Filter | None = None, threshold: float = -np.inf
) -> list[list[int]]:
    """Rows of each question: exact search over the documents that meet the condition."""
    scores = vectors.astype(np.float64) @ EMBEDDINGS.T.astype(np.float64)
    found = []
    for of_question in scores:
        rows = [
            row
            for row, document in enumerate(DOCUMENTS)
            if (condition is None or matches(condition, document.get("metadata", {})))
            and np.float32(of_question[row]) >= threshold
        ]
        found.append(sorted(rows, key=lambda row: -of_question[row])[:n_docs])
    return found


def rows_of(retrieved: Any) -> list[list[int]]:
    pairs = zip(retrieved.rows.tolist(), retrieved.n_docs_found, strict=True)
    return [rows[:found] for rows, found in pairs]


CONDITIONS: list[Filter] = [
    Equal("language", "de"),
    Not(Equal("open", True)),
    Range("year", gte=1995, lt=2005),
    OneOf("source.name", ("source 1", "source 3")),
    Equal("language", "none"),
]


@pytest.mark.parametrize("max_exact_rows", [0, 1000])
# Milvus makes as many lists as it is told, milvus-lite always 128: pymilvus sends nlist where it does not look.
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("local", kind) for kind in ("Flat", "PQ8", "HNSW32", "IVF4,Flat")]
    + [("milvus", kind) for kind in ("Flat", "HNSW32", "IVF128,Flat")],
    indirect=["backend"],
)
async def test_filter_leaves_the_best_of_the_documents_that_meet_it(
    retrieving: Retrieving, snapshots: Build, kind: str, max_exact_rows: int
) -> None:
    """Whether exact, by faiss's selector, or on a kind that has none: the same documents."""
    snapshot = snapshots(kind, nprobe=128 if kind == "IVF128,Flat" else 4, ef_search=400)
    async with retrieving(snapshot, max_exact_rows=max_exact_rows) as retriever:
        for condition in CONDITIONS:
            retrieved = await retriever.retrieve(query(filter=condition))
            assert rows_of(retrieved) == expected(VECTORS, 5, condition), condition


async def test_filters_that_python_calls_equal_are_not_confused(
    retrieving: Retrieving, snapshots: Build
) -> None:
    """1 == True == 1.0 to a dictionary: the rows of one filter were kept for another."""
    async with retrieving(snapshots("Flat")) as retriever:
        for value in (1, True, "1", 1.5, False):
            condition = Equal("mixed", value)
            retrieved = await retriever.retrieve(query(filter=condition))
            assert rows_of(retrieved) == expected(VECTORS, 5, condition), value


async def test_requests_of_different_filters_never_share_a_search(
    retrieving: Retrieving, snapshots: Build
) -> None:
    async with retrieving(snapshots("Flat"), max_exact_rows=0, batch_window_s=0.05) as retriever:
        asked = [CONDITIONS[place % 4] for place in range(24)]
        answers = await asyncio.gather(*(retriever.retrieve(query(filter=one)) for one in asked))
        for condition, answer in zip(asked, answers, strict=True):
            assert rows_of(answer) == expected(VECTORS, 5, condition)


async def test_score_threshold_leaves_out_what_scores_less(retrieving: Retrieving, snapshots: Build) -> None:
    async with retrieving(snapshots("Flat")) as retriever:
        whole = await retriever.retrieve(query(n_docs=20))
        threshold = float(whole.doc_scores[0, 3])
        retrieved = await retriever.retrieve(query(n_docs=20, score_threshold=threshold))
        assert rows_of(retrieved) == expected(VECTORS, 20, threshold=threshold)
        assert retrieved.n_docs_found[0] == 4
        nothing = await retriever.retrieve(query(n_docs=20, score_threshold=1e9))
        assert nothing.rows.shape == (len(VECTORS), 0)
        assert nothing.n_docs_found == [0] * len(VECTORS)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
@pytest.mark.parametrize("metric", list(Metric))
async def test_rescoring_a_wider_list_finds_what_codes_lose(
    retrieving: Retrieving, snapshots: Build, metric: Metric
) -> None:
    vectors = np.random.default_rng(5).standard_normal((32, DIM)).astype(np.float32)
    snapshot = snapshots("PQ4x4", metric=metric)
    store = SqliteStore(snapshot.documents_file, DIM)
    best = exact_search(store, vectors, 5, metric, range(len(DOCUMENTS)))
    recalls = []
    async with retrieving(snapshot) as retriever:
        for factor in (1, 4, 60):
            retrieved = await retriever.retrieve(query(vectors, rescore_factor=factor))
            assert retrieved.rows.shape == (32, 5)
            assert (np.diff(retrieved.doc_scores, axis=1) <= 0).all()
            pairs = zip(best, retrieved.rows, strict=True)
            recalls.append(np.mean([np.isin(wanted, found).mean() for wanted, found in pairs]))
    assert recalls[0] < recalls[1] < recalls[2] == 1


@pytest.mark.parametrize("metric", list(Metric))
def test_exact_search_is_faiss_flat_search(tmp_path: Path, snapshots: Build, metric: Metric) -> None:
    snapshot = snapshots("Flat", metric=metric)
    store = SqliteStore(snapshot.documents_file, DIM)
    flat = FaissIndex.load(snapshot.index_file)
    from retriever_service.types import SearchParameters

    rows = exact_search(store, VECTORS, 9, metric, range(len(DOCUMENTS)))
    np.testing.assert_array_equal(rows, flat.search(VECTORS, 9, SearchParameters())[0])
    assert exact_search(store, VECTORS, 9, metric, np.empty(0, np.int64)).shape == (6, 0)


async def sampled(retriever: Any) -> tuple[float, float]:
    """(questions, mean recall) of what was sampled so far."""
    retriever._sampling.submit(lambda: None).result()
    (family,) = retriever._metrics.live_recall_ratio.collect()
    values = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
    return values["count"], values["sum"] / max(values["count"], 1)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
async def test_live_recall_is_that_of_the_answers(retrieving: Retrieving, snapshots: Build) -> None:
    async with retrieving(snapshots("IVF16,Flat", nprobe=1), recall_sample_rate=1.0) as retriever:
        for row in range(len(VECTORS)):
            vectors = VECTORS[row : row + 1]
            await retriever.retrieve(query(vectors))
            await sampled(retriever)
            retriever._sampler._rests_until_s = 0.0
            # A threshold leaves documents out on purpose: it says nothing of recall.
            await retriever.retrieve(query(vectors, score_threshold=0.0))
        count, mean = await sampled(retriever)
        assert count == len(VECTORS)
        found = [
            (await retriever.retrieve(query(VECTORS[row : row + 1]))).rows[0] for row in range(len(VECTORS))
        ]
        wanted = expected(VECTORS, 5)
        assert mean == pytest.approx(
            np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)])
        )
        assert mean < 1


@pytest.mark.usefixtures("approximate")
@pytest.mark.parametrize("backend", ["milvus"], indirect=True)
async def test_live_recall_on_milvus_comes_from_parts_of_the_documents(
    retrieving: Retrieving, snapshots: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever_service.milvus.index._LARGEST_SHARE", 1)  # all are one part
    async with retrieving(snapshots("IVF128,Flat", nprobe=128), recall_sample_rate=1.0) as retriever:
        for nprobe in (0, 1):
            await retriever.retrieve(query(search_parameters=SearchParameters(nprobe=nprobe)))
            count, mean = await sampled(retriever)
            retriever._sampler._rests_until_s = 0.0
            assert (count, mean == 1.0) == (nprobe + 1, nprobe == 0)


async def test_exhaustive_index_and_a_rate_of_zero_are_never_sampled(
    retrieving: Retrieving, snapshots: Build
) -> None:
    for kind, rate in (("Flat", 1.0), ("IVF128,Flat", 0.0)):
        async with retrieving(snapshots(kind, nprobe=1), recall_sample_rate=rate) as retriever:
            await retriever.retrieve(query())
            assert (await sampled(retriever))[0] == 0


@pytest.mark.parametrize("backend", ["local"], indirect=True)
async def test_a_retriever_that_closes_waits_for_a_sample_beside_other_answers(
    retrieving: Retrieving, snapshots: Build
) -> None:
    ended = threading.Event()
    async with retrieving(snapshots("IVF16,Flat"), recall_sample_rate=1.0) as retriever:
        retriever._sampling.submit(ended.wait, 20)
        closing = asyncio.create_task(retriever.close())
        await asyncio.sleep(0.1)  # of the event loop, which others are answered in
        assert not closing.done()
        ended.set()
        await closing
