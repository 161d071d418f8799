"""Changing the corpus over the wire: upserts, deletes, listing, compaction, activation."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import struct_pb2

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_client.filters import metadata_filter
from retriever_service.corpus.base import Page
from retriever_service.corpus.local_library import LocalLibrary
from retriever_service.corpus_wire import ChangeLimits, page_response
from retriever_service.filters import Filter
from retriever_service.maintenance import Maintenance
from retriever_service.milvus.library import MilvusLibrary
from retriever_service.types import Document, Selection
from tests.retriever_service.servicer_calls import DIM, array, request, tensor, violated_fields
from tests.retriever_service.tiny_models import make_documents, write_jsonl

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]
Build = Callable[..., Any]
UpsertRequest = retriever_service_pb2.UpsertDocumentsRequest


def vectors(*seeds: int, dim: int = DIM) -> Any:
    return np.stack([np.random.default_rng(seed).standard_normal(dim) for seed in seeds]).astype(np.float32)


def batch(*keys: str, seed: int = 0, **fields: Any) -> UpsertRequest:
    documents = [document_pb2.Document(key=key, text=f"text of {key}") for key in keys]
    embeddings = tensor(vectors(*range(seed, seed + len(keys))))
    return UpsertRequest(**({"documents": documents, "embeddings": embeddings} | fields))


async def upsert(stub: Any, *batches: UpsertRequest) -> list[Any]:
    return [response async for response in stub.UpsertDocuments(iter(batches))]


async def until_refused(stub: Any, *batches: UpsertRequest) -> list[Any]:
    answers = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for answer in stub.UpsertDocuments(iter(batches)):
            answers.append(answer)  # noqa: PERF401  (those before the error count)
    return answers


async def keys_found(stub: Any, seed: int, n_docs: int = 5, **fields: Any) -> list[str]:
    asked = retriever_service_pb2.RetrieveRequest(
        question_hidden_states=tensor(10 * vectors(seed)),
        n_docs=n_docs,
        skip_contexts=True,
        include_documents=True,
        **fields,
    )
    return [document.key for document in (await stub.Retrieve(asked)).documents]


async def ended(stub: Any, operation: Any) -> Any:
    while not operation.done:
        await asyncio.sleep(0.01)
        answer = await stub.GetOperation(retriever_service_pb2.GetOperationRequest(name=operation.name))
        operation = answer.operation
    return operation


async def activate(stub: Any, folder: str, **fields: Any) -> Any:
    asked = retriever_service_pb2.ActivateIndexRequest(index_folder=folder, **fields)
    return await ended(stub, (await stub.ActivateIndex(asked)).operation)


async def compact(stub: Any) -> Any:
    begun = await stub.CompactIndex(retriever_service_pb2.CompactIndexRequest())
    return await ended(stub, begun.operation)


async def test_a_stream_of_batches_is_acknowledged_batch_by_batch(
    serve_retriever: Serve, folder: Path
) -> None:
    metadata = struct_pb2.Struct()
    metadata.update({"year": 1984, "ratio": 0.5, "tags": ["a"], "nested": {"x": None}})
    documents = [document_pb2.Document(key="m", title="T", text="emoji 🦉", metadata=metadata)]
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        first, second = await upsert(
            stub,
            batch("a", "b", seed=1, request_id="r"),
            UpsertRequest(documents=documents, embeddings=tensor(vectors(9))),
        )
        assert (first.request_id, first.created, first.replaced, list(first.rows)) == ("r", 2, 0, [60, 61])
        assert second.sequence == first.sequence + 1 == 3
        assert (await keys_found(stub, 2))[0] == "b"
        read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=["m"]))
        assert read.documents[0].metadata == metadata
        assert read.documents[0].etag == second.etags[0]
        assert (await upsert(stub, batch("a", "b", seed=1, request_id="r")))[0] == first
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        assert (index.ntotal, index.sequence, index.pending_changes, index.writable) == (63, 3, 3, True)
        again = await upsert(stub, batch("a", seed=5))
        row = retriever_service_pb2.GetDocumentsRequest(rows=[60, again[0].rows[0]])
        read = await stub.GetDocuments(row)
        assert (list(read.missing_rows), read.documents[0].key) == ([60], "a")


@pytest.mark.parametrize("max_exact_rows", [0, 1000])
async def test_filter_finds_a_document_that_is_overwritten_while_it_is_evaluated(
    serve_retriever: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch, max_exact_rows: int
) -> None:
    """The search found neither version: the filter's rows were the old one's, and the index showed the new one."""
    async with serve_retriever(index_folder=folder, max_exact_rows=max_exact_rows) as (retriever, stub, _):
        await upsert(stub, batch("k", seed=3))
        select, loop = retriever.store.select, asyncio.get_running_loop()

        def overtaken(condition: Filter) -> Selection:
            selection: Selection = select(condition)
            asyncio.run_coroutine_threadsafe(upsert(stub, batch("k", seed=3)), loop).result(30)
            return selection

        monkeypatch.setattr(retriever.store, "select", overtaken)
        everything = metadata_filter({"no": {"$ne": 1}})
        assert (await keys_found(stub, 3, filter=everything)).count("k") == 1


async def test_what_is_deleted_is_found_no_more_and_listing_shows_the_rest(
    serve_retriever: Serve, folder: Path
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        await upsert(stub, batch("zz", seed=3))
        gone = [document_pb2.Document(key=key).key for key in ("zz", "no such")]
        references = [retriever_service_pb2.DocumentReference(key=key) for key in gone]
        answer = await stub.DeleteDocuments(
            retriever_service_pb2.DeleteDocumentsRequest(documents=references)
        )
        assert (answer.deleted, list(answer.missing_keys)) == (1, ["no such"])
        assert "zz" not in await keys_found(stub, 3, n_docs=50)
        keys: list[str] = []
        token = ""
        while True:
            asked = retriever_service_pb2.ListDocumentsRequest(page_size=25, page_token=token)
            page = await stub.ListDocuments(asked)
            assert page.total_size == 60
            keys += [document.key for document in page.documents]
            token = page.next_page_token
            if not token:
                break
        assert keys == sorted(document["key"] for document in make_documents(60, DIM))


def odd(**fields: Any) -> Any:
    return document_pb2.Document(**({"key": "k", "text": "t"} | fields))


def nested(levels: int) -> struct_pb2.Struct:
    inner: dict[str, Any] = {}
    for _ in range(levels - 1):
        inner = {"a": inner}
    struct = struct_pb2.Struct()
    struct.update(inner)
    return struct


WRONG: dict[str, tuple[UpsertRequest, str]] = {
    "no documents": (UpsertRequest(), "documents"),
    "no key": (batch("a", "b", documents=[odd(), odd(key="")]), "documents[1].key"),
    "a key twice": (batch("a", "b", "a"), "documents[2].key"),
    "a long key": (batch("k" * 1025), "documents[0].key"),
    "no text": (batch("a", documents=[odd(text="")]), "documents[0].text"),
    "a long text": (batch("a", documents=[odd(text="x" * ((1 << 20) + 1))]), "documents[0].text"),
    "NaN": (batch("a", embeddings=tensor([[np.nan] * DIM])), "embeddings"),
    "infinity": (batch("a", embeddings=tensor([[np.inf] * DIM])), "embeddings"),
    "too long a vector": (batch("a", embeddings=tensor([[1e30] * DIM])), "embeddings[0]"),
    "a zero vector": (batch("a", "b", embeddings=tensor([[1.0] * DIM, [0.0] * DIM])), "embeddings[1]"),
    "another dimension": (batch("a", embeddings=tensor(vectors(1, dim=8))), "embeddings"),
    "too few vectors": (batch("a", "b", embeddings=tensor(vectors(1))), "embeddings"),
    "whole numbers": (batch("a", embeddings=tensor([[1] * DIM], np.int64)), "embeddings"),
    "deep metadata": (batch("a", documents=[odd(metadata=nested(25))]), "documents[0].metadata"),
    "a long request_id": (batch("a", request_id="r" * 257), "request_id"),
}


async def test_wrong_batches_are_refused_by_field_and_leave_nothing(
    serve_retriever: Serve, folder: Path
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        for name, (wrong, field) in WRONG.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await upsert(stub, wrong)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
            assert violated_fields(caught.value) == [field], name
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        assert (index.ntotal, index.sequence) == (60, 0)
        for number, wrong in enumerate(wrong for wrong, _ in WRONG.values()):
            # What was acknowledged before it in the same stream stays.
            answers = await until_refused(stub, batch(f"fine {number}"), wrong, batch("no"))
            assert [answer.sequence for answer in answers] == [number + 1]
        read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=["a", "b", "no"]))
        assert not read.documents
        with pytest.raises(grpc.aio.AioRpcError, match="--embedding-model") as caught:
            await upsert(stub, UpsertRequest(documents=[odd()]))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        for token in ("%%%", "gA"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListDocuments(retriever_service_pb2.ListDocumentsRequest(page_token=token))
            assert violated_fields(caught.value) == ["page_token"]


async def test_odd_documents_come_back_as_they_were_sent(
    serve_retriever: Serve, folder: Path, backend: str
) -> None:
    longest = 1 << 20 if backend == "local" else 65_535
    texts = ["NUL \0 inside", "\0", "🦉" * 1000, "x" * longest, "' \" \\ % _ ; --"]
    documents = [odd(key=f"\0{place}🦉", title="", text=text) for place, text in enumerate(texts)]
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        seeds = range(100, 100 + len(texts))
        await upsert(stub, UpsertRequest(documents=documents, embeddings=tensor(vectors(*seeds))))
        for place, document in enumerate(documents):
            read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=[document.key]))
            assert read.documents[0].text == texts[place]
            assert (await keys_found(stub, 100 + place, 1)) == [document.key]
        deepest = odd(key="deep", metadata=nested(24))
        await upsert(stub, UpsertRequest(documents=[deepest], embeddings=tensor(vectors(200))))
        read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=["deep"]))
        assert read.documents[0].metadata == deepest.metadata
        reference = retriever_service_pb2.DocumentReference(key="deep")
        await stub.DeleteDocuments(retriever_service_pb2.DeleteDocumentsRequest(documents=[reference]))
        await compact(stub)
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        listed = await stub.ListDocuments(retriever_service_pb2.ListDocumentsRequest(page_size=5))
        assert {one.key: one.text for one in listed.documents} == {one.key: one.text for one in documents}
        for place, document in enumerate(documents):
            assert (await keys_found(stub, 100 + place, 1)) == [document.key]
            question = tensor(10 * vectors(100 + place).repeat(3, axis=0))
            answer = await stub.Retrieve(request(question_hidden_states=question, n_docs=1))
            assert array(answer.context_input_ids).shape[0] == 3


async def test_vectors_of_a_normalised_index_have_length_one(
    serve_retriever: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        import gc

        made = [one for one in gc.get_objects() if type(one) is Maintenance]
        (maintenance,) = [one for one in made if one._generations.corpora]
        generation = maintenance._generations.current.generation
        normalised = generation.manifest.embedding.model_copy(update={"normalize": True})
        object.__setattr__(
            generation, "manifest", generation.manifest.model_copy(update={"embedding": normalised})
        )
        for vector in (np.zeros(DIM), np.ones(DIM)):
            with pytest.raises(grpc.aio.AioRpcError, match="length 1") as caught:
                await upsert(stub, batch("a", embeddings=tensor([vector])))
            assert violated_fields(caught.value) == ["embeddings[0]"]


async def test_compaction_swaps_under_load_and_generations_can_be_pinned(
    serve_retriever: Serve, folder: Path
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        stop = asyncio.Event()

        async def search() -> None:
            generations: list[int] = []
            while not stop.is_set():
                answer = await stub.Retrieve(request(n_docs=4))
                assert array(answer.doc_scores).shape == (3, 4)
                generations.append(answer.generation)
            assert generations == sorted(generations)

        load = [asyncio.create_task(search()) for _ in range(4)]
        for round_ in range(3):
            await upsert(stub, batch(f"fresh-{round_}", seed=round_ + 5))
            operation = await compact(stub)
            assert operation.response.generation == round_ + 2
            assert operation.response.ntotal == 61 + round_
        stop.set()
        await asyncio.gather(*load)
        assert (await keys_found(stub, 5, 1, generation=3)) == ["fresh-0"]
        with pytest.raises(grpc.aio.AioRpcError, match="3, 4 can be pinned") as caught:
            await keys_found(stub, 0, generation=1)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        listed = await stub.ListOperations(retriever_service_pb2.ListOperationsRequest())
        assert len(listed.operations) == 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetOperation(retriever_service_pb2.GetOperationRequest(name="operations/none"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.fixture
def other(tmp_path: Path, build_corpus: Build) -> Path:
    build_corpus(write_jsonl(tmp_path / "o.jsonl", make_documents(20, DIM)), tmp_path / "other")
    return tmp_path / "other"


async def test_activation_swaps_refuses_what_does_not_fit_and_goes_back(
    serve_retriever: Serve, folder: Path, other: Path, tmp_path: Path, build_corpus: Build
) -> None:
    build_corpus(write_jsonl(tmp_path / "w.jsonl", make_documents(20, 8)), tmp_path / "wrong")
    expectation = document_pb2.Expectation(dimension=DIM, embedding_model="tiny-encoder")
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        await upsert(stub, batch("fresh", seed=3))
        await stub.GetIndex(retriever_service_pb2.GetIndexRequest(expectation=expectation))
        operation = await activate(stub, "other")
        assert (operation.response.generation, operation.response.ntotal) == (2, 20)
        assert "fresh" not in await keys_found(stub, 3, 20)
        assert (await keys_found(stub, 3, 1, generation=1)) == ["fresh"]
        await upsert(stub, batch("in other", seed=4))
        refused = await activate(stub, "wrong")
        assert (refused.error.reason, refused.error.code) == ("EXPECTATION_MISMATCH", 9)
        missing = await activate(stub, "nothing")
        assert missing.error.reason == "INDEX_MISSING"
        for outside in ("", "..", "/etc", "../../x"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await activate(stub, outside)
            assert violated_fields(caught.value) == ["index_folder"]
        back = await activate(stub, "index")
        assert (back.response.generation, back.response.ntotal) == (3, 61)
        assert (await keys_found(stub, 3, 1)) == ["fresh"]
        assert (await compact(stub)).response.generation == 4
        assert (await activate(stub, "other")).response.generation == 5
        assert (await keys_found(stub, 4, 1)) == ["in other"]
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        assert (index.generation, index.ntotal) == (5, 21), "a restart forgot what was activated"
        forced = await activate(stub, "wrong", ignore_callers=True)
        assert forced.response.dimension == 8


async def test_operations_are_answered_once_what_they_made_has_gone(
    serve_retriever: Serve, folder: Path, other: Path, tmp_path: Path, build_corpus: Build
) -> None:
    """The answer was read from the corpus, which was closed."""
    build_corpus(write_jsonl(tmp_path / "t.jsonl", make_documents(10, DIM)), tmp_path / "third")
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        await upsert(stub, batch("fresh"))
        compacted = await compact(stub)
        await upsert(stub, batch("later"))
        swaps = [await activate(stub, name) for name in (other.name, "third")]
        await asyncio.sleep(0.2)
        listed = await stub.ListOperations(retriever_service_pb2.ListOperationsRequest())
        assert list(listed.operations) == [*reversed(swaps), compacted]
        assert (compacted.response.ntotal, list(compacted.response.generations)) == (61, [1, 2])


async def test_folders_that_can_be_none_are_refused_by_field(
    serve_retriever: Serve, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        for name in ("\0", "B\0", "x" * 300, "x/" * 5000, "loop", "loop/x", "index/../../x"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await activate(stub, name)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
            assert violated_fields(caught.value) == ["index_folder"]
        for name in ("index/CURRENT", "index/CURRENT/x"):
            assert (await activate(stub, name)).error.reason == "INDEX_MISSING"


async def test_those_who_call_while_a_folder_is_loaded_are_heard(
    serve_retriever: Serve,
    folder: Path,
    tmp_path: Path,
    build_corpus: Build,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only those who had called before counted: a generator that had just been told that all fits was refused."""
    build_corpus(write_jsonl(tmp_path / "w.jsonl", make_documents(20, 8)), tmp_path / "wrong")
    library = LocalLibrary if backend == "local" else MilvusLibrary
    opens = library.open
    loading, called = threading.Event(), threading.Event()

    def open_slowly(*arguments: Any) -> Any:
        opened = opens(*arguments)
        loading.set()
        assert called.wait(60)
        return opened

    expected = retriever_service_pb2.GetIndexRequest(expectation=document_pb2.Expectation(dimension=DIM))
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        monkeypatch.setattr(library, "open", open_slowly)
        for ignored in (False, True):
            asked = retriever_service_pb2.ActivateIndexRequest(index_folder="wrong", ignore_callers=ignored)
            begun = await stub.ActivateIndex(asked)
            assert await asyncio.to_thread(loading.wait, 60)
            await stub.GetIndex(expected)
            called.set()
            operation = await ended(stub, begun.operation)
            assert operation.error.reason == ("" if ignored else "EXPECTATION_MISMATCH")
            assert operation.response.dimension == (8 if ignored else 0)
            loading.clear()
            called.clear()


async def test_answers_hold_as_many_documents_as_a_message(serve_retriever: Serve, folder: Path) -> None:
    """What was asked for was read, put together, and then refused by gRPC as too large to be sent."""
    keys = [f"large-{place:02d}" for place in range(9)]
    texts = {key: "x" * (2000 if place < 8 else 6000) for place, key in enumerate(keys)}
    async with serve_retriever(index_folder=folder, max_message_bytes=8192) as (_, stub, _):
        for place, key in enumerate(keys):
            await upsert(stub, batch(key, seed=place, documents=[odd(key=key, text=texts[key])]))
        listed: list[str] = []
        token, largest = "", 0
        while not listed or token:
            page = await stub.ListDocuments(retriever_service_pb2.ListDocumentsRequest(page_token=token))
            listed += [document.key for document in page.documents]
            largest = max(largest, page.ByteSize())
            token = page.next_page_token
        assert listed == sorted([*keys, *(document["key"] for document in make_documents(60, DIM))])
        assert 6000 < largest <= 8192
        with pytest.raises(grpc.aio.AioRpcError, match="ask for 4, which fit") as caught:
            await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=["none", *keys]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violated_fields(caught.value) == ["keys"]
        fits = retriever_service_pb2.GetDocumentsRequest(keys=["none", *keys[:4]])
        read = await stub.GetDocuments(fits)
        assert [document.key for document in read.documents] == keys[:4]
        assert list(read.missing_keys) == ["none"]
        asked = request(n_docs=30, include_documents=True, skip_contexts=True)
        with pytest.raises(grpc.aio.AioRpcError, match="read them by GetDocuments") as caught:
            await stub.Retrieve(asked)
        assert violated_fields(caught.value) == ["include_documents"]
        assert len((await stub.Retrieve(request(n_docs=30, skip_contexts=True))).n_docs_found) == 3


def test_page_has_one_document_however_large() -> None:
    documents = [Document(row, f"k{row}", "", "x" * 5000, None, "") for row in range(2)]
    page = page_response(Page(documents, more=False), 2, ChangeLimits(max_message_bytes=4096))
    assert [document.key for document in page.documents] == ["k0"]
    assert page.next_page_token


async def test_activation_swaps_under_load_and_no_answer_is_of_two_corpora(
    serve_retriever: Serve, folder: Path, tmp_path: Path, build_corpus: Build
) -> None:
    renamed = [one | {"key": f"other-{one['key']}"} for one in make_documents(20, DIM)]
    build_corpus(write_jsonl(tmp_path / "r.jsonl", renamed), tmp_path / "renamed")
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        stop, seen = asyncio.Event(), set()

        async def search() -> None:
            before = 0
            while not stop.is_set():
                answer = await stub.Retrieve(request(n_docs=4, include_documents=True, skip_contexts=True))
                is_other = {document.key.startswith("other-") for document in answer.documents}
                # Even numbers are those of the folder that was activated.
                assert is_other == {answer.generation % 2 == 0}
                assert len(answer.documents) == 12
                assert answer.generation >= before
                before = answer.generation
                seen.add(answer.generation)

        load = [asyncio.create_task(search()) for _ in range(4)]
        for number in range(2, 7):
            swapped = await activate(stub, "renamed" if number % 2 == 0 else "index")
            assert swapped.response.generation == number
            while number not in seen and not any(one.done() for one in load):  # noqa: ASYNC110  (as `ended`)
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*load)
        assert {2, 3, 4, 5, 6} <= seen


async def test_a_second_retriever_reads_and_refuses_to_write(
    serve_retriever: Serve, folder: Path, tmp_path: Path
) -> None:
    async with serve_retriever(index_folder=folder, read_only=True) as (_, stub, _):
        for call in (
            lambda: upsert(stub, batch("a")),
            lambda: compact(stub),
            lambda: activate(stub, "index"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="read-only") as caught:
                await call()
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert len(await keys_found(stub, 0)) == 5
    assert not any(name.startswith("live-") for name in os.listdir(folder))  # noqa: PTH208


async def test_enough_changes_are_compacted_by_themselves(serve_retriever: Serve, folder: Path) -> None:
    async with serve_retriever(index_folder=folder, compact_after=10) as (_, stub, _):
        await upsert(stub, batch(*(f"k{place}" for place in range(12))))
        listed = await stub.ListOperations(retriever_service_pb2.ListOperationsRequest())
        assert (await ended(stub, listed.operations[0])).response.generation == 2


async def test_cancelling_an_operation_leaves_what_serves(serve_retriever: Serve, folder: Path) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        begun = await stub.CompactIndex(retriever_service_pb2.CompactIndexRequest())
        name = retriever_service_pb2.CancelOperationRequest(name=begun.operation.name)
        await stub.CancelOperation(name)
        operation = await ended(stub, begun.operation)
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        cancelled = operation.error.reason == "CANCELLED_BY_CALLER"
        assert index.generation == (1 if cancelled else 2)


async def test_upserts_of_many_callers_all_arrive(serve_retriever: Serve, folder: Path) -> None:
    async def caller(number: int) -> None:
        async def batches() -> AsyncIterator[UpsertRequest]:
            for step in range(5):
                yield batch(f"{number}-{step}", seed=10 * number + step)

        assert len([one async for one in stub.UpsertDocuments(batches())]) == 5

    async with serve_retriever(index_folder=folder) as (_, stub, _):
        await asyncio.gather(*(caller(number) for number in range(8)))
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        assert (index.ntotal, index.sequence) == (100, 40)


async def test_filters_follow_changes_and_compactions(serve_retriever: Serve, folder: Path) -> None:
    """A filter's rows are kept between requests: they must not outlive the corpus that they were found in."""
    async with serve_retriever(index_folder=folder) as (_, stub, _):

        async def found() -> list[str]:
            return sorted(set(await keys_found(stub, 5, 5, filter=metadata_filter({"new": True}))))

        async def write(new: bool, *keys: str) -> None:
            asked = batch(*keys, seed=5)
            for document in asked.documents:
                document.metadata.update({"new": new})
            await upsert(stub, asked)

        assert await found() == []
        await write(True, "fresh", "other")
        assert await found() == ["fresh", "other"]
        await compact(stub)
        assert await found() == ["fresh", "other"]
        gone = [retriever_service_pb2.DocumentReference(key="fresh")]
        await stub.DeleteDocuments(retriever_service_pb2.DeleteDocumentsRequest(documents=gone))
        assert await found() == ["other"]
        await write(False, "other")
        assert await found() == []
        await compact(stub)
        assert await found() == []
