"""Search, fetch, score, assemble."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import InvalidArgumentError
from retriever_service.bounded_cache import BoundedCache
from retriever_service.completer import Completer
from retriever_service.context.assembler import ContextAssembler
from retriever_service.errors import InvalidSearchParametersError, NoQuestionTokenizerError, OverloadedError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot
from retriever_service.milvus.index import MilvusIndex
from retriever_service.store.passage_reader import PassageCache, PassageReader
from retriever_service.types import Metric, Query, SearchParameters
from tests.retriever_service.tiny_models import embeddings_of, make_documents, write_jsonl

DIM = 16
SEARCHED = {"local": FaissIndex, "milvus": MilvusIndex}
DOCUMENTS = make_documents(300, DIM, seed=4)
EMBEDDINGS = embeddings_of(DOCUMENTS)
VECTORS = np.random.default_rng(8).standard_normal((6, DIM)).astype(np.float32)
Build = Callable[..., Snapshot]
Retrieving = Callable[..., AbstractAsyncContextManager[Any]]


def query(vectors: Any = VECTORS, n_docs: int = 5, **others: Any) -> Query:
    texts = [f"question {row}" for row in range(len(vectors))]
    return Query(vectors, n_docs, others.pop("max_combined_length", 60), question_texts=texts, **others)


def exact(vectors: Any, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
    scores = vectors.astype(np.float64) @ EMBEDDINGS.T.astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]
    return order, np.take_along_axis(scores, order, 1).astype(np.float32)


@pytest.fixture
def build(tmp_path: Path, build_corpus: Build) -> Build:
    corpus = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    return lambda **options: build_corpus(corpus, tmp_path / "index", **options)


async def test_flat_index_gives_the_best_documents_with_exact_scores(
    retrieving: Retrieving, build: Build
) -> None:
    async with retrieving(build()) as retriever:
        retrieved = await retriever.retrieve(query())
    rows, scores = exact(VECTORS, 5)
    np.testing.assert_array_equal(retrieved.rows, rows)
    np.testing.assert_array_equal(retrieved.doc_scores, scores)
    np.testing.assert_array_equal(retrieved.doc_embeds, EMBEDDINGS[rows])
    assert list(retrieved.n_docs_found) == [5] * 6
    for found, row_numbers in zip(retrieved.documents, rows.tolist(), strict=True):
        assert [document.key for document in found if document] == [
            DOCUMENTS[row]["key"] for row in row_numbers
        ]
    assert retrieved.contexts is not None
    assert retrieved.contexts.input_ids.shape[0] == 30


async def test_documents_that_were_read_are_not_read_again(
    retrieving: Retrieving, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: PassageCache = BoundedCache(1 << 20)
    async with retrieving(build(), passage_cache=cache) as retriever:
        first = await retriever.retrieve(query())
        assert len(cache) == len(np.unique(first.rows))
        monkeypatch.delattr(PassageReader, "_read")
        again = await retriever.retrieve(query())
    np.testing.assert_array_equal(again.doc_scores, first.doc_scores)
    assert again.documents == first.documents


# Milvus has IVF8,PQ4x4 as well, milvus-lite has not, and always makes 128 lists.
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("local", kind) for kind in ("Flat", "HNSW8", "IVF8,Flat", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4", "SQ8")]
    + [("milvus", kind) for kind in ("Flat", "HNSW8", "IVF128,Flat", "IVF128,SQ8")],
    indirect=["backend"],
)
@pytest.mark.parametrize("metric", list(Metric))
async def test_doc_scores_are_exact_and_ordered_whatever_the_kind(
    retrieving: Retrieving, build: Build, kind: str, metric: Metric
) -> None:
    snapshot = build(kind=kind, metric=metric, nprobe=128 if "128" in kind else 8)
    async with retrieving(snapshot) as retriever:
        retrieved = await retriever.retrieve(query(n_docs=20))
    products = np.einsum("bd,bnd->bn", VECTORS, EMBEDDINGS[retrieved.rows], dtype=np.float64)
    np.testing.assert_array_equal(retrieved.doc_scores, products.astype(np.float32))
    assert (np.diff(retrieved.doc_scores, axis=1) <= 0).all()
    assert all(len(set(rows)) == 20 for rows in retrieved.rows.tolist())


async def test_answer_does_not_depend_on_the_batch(retrieving: Retrieving, build: Build) -> None:
    async with retrieving(build()) as retriever:
        together = await retriever.retrieve(query())
        for position in range(len(VECTORS)):
            alone = await retriever.retrieve(query(VECTORS[position : position + 1]))
            np.testing.assert_array_equal(alone.rows[0], together.rows[position])
            np.testing.assert_array_equal(alone.doc_scores[0], together.doc_scores[position])


async def test_question_alone_is_answered_where_it_was_searched_and_others_as_well(
    retrieving: Retrieving, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    complete = Completer.complete

    def noting(self: Completer, batch: Any) -> Any:
        threads.extend(threading.current_thread().name.partition("_")[0] for _ in batch)
        return complete(self, batch)

    monkeypatch.setattr(Completer, "complete", noting)
    async with retrieving(build()) as retriever:
        alone = await retriever.retrieve(query(VECTORS[:1]))
        assert threads == ["search"]
        crowd = await asyncio.gather(*(retriever.retrieve(query(VECTORS[:1])) for _ in range(8)))
    assert threads.count("assemble") >= 7
    for one in crowd:
        np.testing.assert_array_equal(one.doc_scores, alone.doc_scores)
        assert one.contexts is not None
        assert alone.contexts is not None
        np.testing.assert_array_equal(one.contexts.input_ids, alone.contexts.input_ids)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
@pytest.mark.parametrize("skip_contexts", [True, False])
async def test_contexts_of_a_long_document_hold_nobody_else_back(
    retrieving: Retrieving,
    tmp_path: Path,
    build_corpus: Build,
    monkeypatch: pytest.MonkeyPatch,
    skip_contexts: bool,
) -> None:
    """They were assembled in the thread that searches: others waited seconds for documents of a megabyte."""
    lines = [
        {"key": "long", "text": "river " * 4000, "embedding": [1.0, 0.0]},
        {"key": "short", "text": "river", "embedding": [0.0, 1.0]},
    ]
    snapshot = build_corpus(write_jsonl(tmp_path / "long.jsonl", lines), tmp_path / "long")
    gate, begun = threading.Event(), threading.Event()
    assemble_batch = ContextAssembler.assemble_batch

    def held(self: ContextAssembler, batch: Any, **settings: Any) -> Any:
        if any(len(part.text) > 1000 for parts in batch for part in parts):
            begun.set()
            assert gate.wait(20)
        return assemble_batch(self, batch, **settings)

    monkeypatch.setattr(ContextAssembler, "assemble_batch", held)
    questions = np.eye(2, dtype=np.float32)
    async with retrieving(snapshot) as retriever, asyncio.timeout(15):
        waiting = asyncio.create_task(retriever.retrieve(query(questions[:1], 1)))
        assert await asyncio.to_thread(begun.wait, 5)
        for others in (1, 8):
            asked = [
                retriever.retrieve(query(questions[1:], 1, skip_contexts=skip_contexts))
                for _ in range(others)
            ]
            for answer in await asyncio.gather(*asked):
                assert answer.rows.tolist() == [[1]]
                assert (answer.contexts is None) == skip_contexts
        assert not waiting.done()
        gate.set()
        contexts = (await waiting).contexts
    assert contexts is not None
    assert contexts.input_ids.shape == (1, 60)


async def test_equal_scores_stand_in_row_order(
    retrieving: Retrieving, tmp_path: Path, build_corpus: Build
) -> None:
    lines = [{"key": str(row), "text": "t", "embedding": [1.0, row % 2]} for row in range(10)]
    snapshot = build_corpus(write_jsonl(tmp_path / "ties.jsonl", lines), tmp_path / "ties")
    async with retrieving(snapshot) as retriever:
        retrieved = await retriever.retrieve(query(np.asarray([[1.0, 1.0]], np.float32), n_docs=10))
    assert retrieved.rows.tolist() == [[1, 3, 5, 7, 9, 0, 2, 4, 6, 8]]


@pytest.mark.usefixtures("approximate")
async def test_fewer_hits_are_reported_and_never_padded_with_documents(
    retrieving: Retrieving, build: Build
) -> None:
    async with retrieving(build(kind="IVF64,Flat", nprobe=1)) as retriever:
        retrieved = await retriever.retrieve(query(n_docs=40))
        nothing_asked = await retriever.retrieve(
            query(n_docs=40, search_parameters=SearchParameters(nprobe=64))
        )
    found = np.asarray(retrieved.n_docs_found)
    assert found.min() < found.max() < 40
    assert retrieved.rows.shape == retrieved.doc_scores.shape == (6, found.max())
    contexts = retrieved.contexts
    assert contexts is not None
    mask = contexts.attention_mask.reshape(6, found.max(), -1)
    for position, count in enumerate(found):
        assert (retrieved.rows[position, :count] >= 0).all()
        assert (retrieved.rows[position, count:] == -1).all()
        assert np.isfinite(retrieved.doc_scores[position, :count]).all()
        assert (retrieved.doc_scores[position, count:] == -np.inf).all()
        assert (retrieved.doc_embeds[position, count:] == 0).all()
        assert all(document is None for document in retrieved.documents[position][count:])
        assert mask[position, :count].any(axis=1).all()
        assert not mask[position, count:].any()
    assert list(nothing_asked.n_docs_found) == [40] * 6


async def test_index_smaller_than_n_docs_gives_all_it_has(
    retrieving: Retrieving, tmp_path: Path, build_corpus: Build
) -> None:
    snapshot = build_corpus(write_jsonl(tmp_path / "three.jsonl", DOCUMENTS[:3]), tmp_path / "three")
    async with retrieving(snapshot) as retriever:
        retrieved = await retriever.retrieve(query(n_docs=50))
    assert retrieved.rows.shape == (6, 3)
    assert list(retrieved.n_docs_found) == [3] * 6


async def test_skipped_contexts_are_none(retrieving: Retrieving, build: Build) -> None:
    async with retrieving(build()) as retriever:
        retrieved = await retriever.retrieve(Query(VECTORS, 5, 60, skip_contexts=True))
    assert retrieved.contexts is None
    assert retrieved.rows.shape == (6, 5)


async def test_concurrent_requests_are_gathered_into_few_searches(
    retrieving: Retrieving, build: Build, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    calls: list[int] = []
    kind: Any = SEARCHED[backend]
    search = kind.search

    def counting(index: Any, vectors: Any, *arguments: Any) -> Any:
        calls.append(len(vectors))
        return search(index, vectors, *arguments)

    monkeypatch.setattr(kind, "search", counting)
    vectors = np.random.default_rng(1).standard_normal((100, DIM)).astype(np.float32)
    async with retrieving(build(), batch_window_s=0.005) as retriever:
        answers = await asyncio.gather(
            *(retriever.retrieve(query(vectors[row : row + 1])) for row in range(len(vectors)))
        )
    assert len(calls) < 20
    assert sum(calls) == 100
    rows, scores = exact(vectors, 5)
    np.testing.assert_array_equal(np.concatenate([answer.rows for answer in answers]), rows)
    np.testing.assert_array_equal(np.concatenate([answer.doc_scores for answer in answers]), scores)


async def test_too_many_waiting_questions_are_refused_with_a_retry_hint(
    retrieving: Retrieving, build: Build, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    gate = threading.Event()
    kind: Any = SEARCHED[backend]
    search = kind.search

    def held(*arguments: Any) -> Any:
        assert gate.wait(5)
        return search(*arguments)

    monkeypatch.setattr(kind, "search", held)
    async with retrieving(build(), max_queued_questions=8) as retriever:
        waiting = asyncio.create_task(retriever.retrieve(query()))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="6 questions are waiting, at most 8") as caught:
            await retriever.retrieve(query())
        assert caught.value.retry_after_s > 0
        gate.set()
        await waiting
        await retriever.retrieve(query())


async def test_cancelled_request_frees_its_place(retrieving: Retrieving, build: Build) -> None:
    async with retrieving(build(), max_queued_questions=8) as retriever:
        for _ in range(20):
            task = asyncio.create_task(retriever.retrieve(query()))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await retriever.retrieve(query())).rows.shape == (6, 5)


async def test_what_cannot_be_answered_is_refused_before_it_waits(
    retrieving: Retrieving, build: Build
) -> None:
    ids = np.ones((6, 3), dtype=np.int64)
    async with retrieving(build()) as retriever:
        with pytest.raises(InvalidSearchParametersError, match="nprobe"):
            await retriever.retrieve(query(search_parameters=SearchParameters(nprobe=3)))
        with pytest.raises(NoQuestionTokenizerError, match="--question-tokenizer"):
            await retriever.retrieve(Query(VECTORS, 5, 60, question_input_ids=ids))
        with pytest.raises(InvalidArgumentError, match="overflows"):
            await retriever.retrieve(query(np.full((1, DIM), 3e38, np.float32), n_docs=300))
