"""A retriever that only reads goes where the one that writes has gone: compactions, activations, and back."""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving.errors import RagError, UnavailableError
from retriever_service.corpus import lock
from retriever_service.errors import ReadOnlyError
from retriever_service.filters import Equal, Not
from retriever_service.main import Serving
from retriever_service.types import Query, SearchParameters
from tests.retriever_service.in_process import in_process
from tests.retriever_service.servicer_calls import DIM, tensor

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]
Build = Callable[..., Any]


@pytest.fixture
def backend() -> str:
    return "local"


def reading(folder: Path, checkpoint: Path, **settings: Any) -> AbstractAsyncContextManager[Serving]:
    return in_process(folder, checkpoint, **({"read_only": True} | settings))


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, DIM)).astype(np.float32)


async def upsert(stub: Any, key: str, seed: int) -> None:
    batch = retriever_service_pb2.UpsertDocumentsRequest(
        documents=[document_pb2.Document(key=key, text=f"text of {key}")], embeddings=tensor(vector(seed))
    )
    assert [answer async for answer in stub.UpsertDocuments(iter([batch]))]


async def ended(stub: Any, operation: Any) -> None:
    while not operation.done:
        asked = retriever_service_pb2.GetOperationRequest(name=operation.name)
        operation = (await stub.GetOperation(asked)).operation
    assert operation.WhichOneof("result") == "response"


async def compact(stub: Any) -> None:
    begun = await stub.CompactIndex(retriever_service_pb2.CompactIndexRequest())
    await ended(stub, begun.operation)


async def activate(stub: Any, folder: Path) -> None:
    begun = await stub.ActivateIndex(retriever_service_pb2.ActivateIndexRequest(index_folder=folder.name))
    await ended(stub, begun.operation)


async def generation_of(stub: Any) -> tuple[int, str]:
    found = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
    return found.generation, found.index_folder


def current(serving: Serving) -> tuple[int, str]:
    served = serving.generations.current
    return served.generation.number, str(served.corpus.folder)


def nearest(serving: Serving, seed: int, number: int = 0) -> str:
    with serving.generations.lease(number) as served:
        rows, _ = served.generation.index.search(vector(seed) * 10, 1, SearchParameters())
        row = int(rows[0, 0])
        return served.generation.store.documents_by_row([row])[row].key


@pytest.mark.parametrize("reader_came_first", [False, True])
async def test_compaction_is_followed_and_every_generation_sees_the_changes_since(
    serve_retriever: Serve, folder: Path, checkpoint: Path, reader_came_first: bool
) -> None:
    """The snapshot holds changes that the older generation has not been shown: to open one must not skip them."""
    async with contextlib.AsyncExitStack() as stack:
        if reader_came_first:
            reader = await stack.enter_async_context(reading(folder, checkpoint))
        _, stub, _ = await stack.enter_async_context(serve_retriever(index_folder=folder))
        if not reader_came_first:
            reader = await stack.enter_async_context(reading(folder, checkpoint))
        await upsert(stub, "before", seed=4)
        await compact(stub)
        await upsert(stub, "after", seed=5)
        await reader.follower.catch_up()
        assert current(reader) == await generation_of(stub) == (2, str(folder))
        for number in (1, 2):
            assert [nearest(reader, seed, number) for seed in (4, 5)] == ["before", "after"]
        served = reader.generations.current
        await reader.follower.catch_up()
        assert reader.generations.current is served
        assert served.corpus.pending_changes == 1


async def test_activation_is_followed_there_and_back_under_the_same_numbers(
    serve_retriever: Serve, folder: Path, other_folder: Path, checkpoint: Path
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _), reading(folder, checkpoint) as reader:
        for path in (other_folder, folder, other_folder):
            await activate(stub, path)
            await upsert(stub, f"new in {path.name}", seed=7)
            await reader.follower.catch_up()
            assert current(reader) == await generation_of(stub)
            assert current(reader)[1] == str(path)
            assert nearest(reader, 7) == f"new in {path.name}"
        await compact(stub)
        await reader.follower.catch_up()
        assert current(reader) == await generation_of(stub)
    async with reading(folder, checkpoint) as started_later:
        assert current(started_later)[1] == str(other_folder)


@pytest.mark.parametrize("max_exact_rows", [0, 1000])
async def test_filters_find_the_old_version_until_the_new_one_is_seen(
    serve_retriever: Serve, folder: Path, checkpoint: Path, max_exact_rows: int
) -> None:
    """SQLite had the new version before the index did: neither was found until the reader looked again."""
    async with (
        serve_retriever(index_folder=folder) as (_, stub, _),
        reading(folder, checkpoint, max_exact_rows=max_exact_rows) as reader,
    ):
        served = reader.generations.current
        everything = Not(Equal("no", 1))
        asked = Query(vector(4) * 10, 1, 0, skip_contexts=True, filter=everything)
        await upsert(stub, "k", seed=4)
        served.corpus.follow()
        rows = []
        for _ in range(3):
            await upsert(stub, "k", seed=4)
            for _ in range(2):
                answer = await served.retriever.retrieve(asked)
                assert [document.key for document in answer.documents[0] if document] == ["k"]
                rows.append(int(answer.rows[0, 0]))
                served.corpus.follow()
        assert rows == [60, 61, 61, 62, 62, 63]


async def test_folder_that_still_serves_is_followed_back_to_once(
    serve_retriever: Serve, folder: Path, other_folder: Path, checkpoint: Path
) -> None:
    """The current corpus was not the last of those that serve: it was taken for newly activated at every look."""
    kept = {"generations_kept": 3}
    async with (
        serve_retriever(index_folder=folder, **kept) as (_, stub, _),
        reading(folder, checkpoint, **kept) as reader,
    ):
        for path in (other_folder, folder):
            await activate(stub, path)
            for _ in range(2):
                await reader.follower.catch_up()
            assert reader.generations.corpora[-1] is reader.generations.current.corpus
        assert reader.generations.numbers == [1, 2, 3]
        await compact(stub)
        await reader.follower.catch_up()
        assert reader.generations.numbers == [2, 3, 4]


async def test_snapshot_that_does_not_warm_up_is_tried_again(
    serve_retriever: Serve, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was counted as opened: the reader stayed where it was, and could not say what it served."""

    async def fail(_: Any) -> None:
        raise UnavailableError("no room")

    async with serve_retriever(index_folder=folder) as (_, stub, _), reading(folder, checkpoint) as reader:
        await compact(stub)
        with monkeypatch.context() as patched:
            patched.setattr(reader.follower, "_warm_up", fail)
            with pytest.raises(UnavailableError):
                await reader.follower.catch_up()
        assert reader.generations.describe(reader.generations.current).number == 1
        await reader.follower.catch_up()
        assert reader.generations.numbers == [1, 2]


async def test_build_into_the_folder_is_followed_once_it_is_activated(
    serve_retriever: Serve, folder: Path, corpus: Path, checkpoint: Path, build_corpus: Build
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _), reading(folder, checkpoint) as reader:
        await upsert(stub, "fresh", seed=4)
        build_corpus(corpus, folder)
        await reader.follower.catch_up()
        reader.generations.current.corpus.follow()
        assert current(reader)[0] == 1
        assert nearest(reader, 4) == "fresh"
        await activate(stub, folder)
        await reader.follower.catch_up()
        assert current(reader)[0] == (await generation_of(stub))[0] == 2
        assert nearest(reader, 4) != "fresh"


async def test_follower_never_becomes_the_writer_of_what_it_follows_to(
    serve_retriever: Serve,
    folder: Path,
    other_folder: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second retriever without --read-only would take the lock that the first, being restarted, has let go."""

    def refuse(root: Path) -> None:
        raise ReadOnlyError(f"another retriever writes to {root}")

    async with contextlib.AsyncExitStack() as second:
        async with serve_retriever(index_folder=folder) as (_, stub, _):
            with monkeypatch.context() as in_another_process:
                in_another_process.setattr(lock, "acquire", refuse)
                reader = await second.enter_async_context(reading(folder, checkpoint, read_only=False))
            await activate(stub, other_folder)
        await reader.follower.catch_up()
        assert current(reader) == (2, str(other_folder))
        assert reader.generations.current.corpus.read_only_reason is not None
    async with reading(folder, checkpoint, read_only=False) as alone:
        generations = alone.generations
        assert alone.library.newer(generations.current.generation, generations.corpora) is None
        assert alone.generations.current.corpus.read_only_reason is None


async def test_folder_that_cannot_be_opened_leaves_what_serves_and_is_tried_again(
    serve_retriever: Serve,
    folder: Path,
    other_folder: Path,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _), reading(folder, checkpoint) as reader:
        await activate(stub, other_folder)
        index_file = other_folder / "generation-000001" / "index.faiss"
        content = index_file.read_bytes()
        index_file.write_bytes(content[:-1])
        with caplog.at_level(logging.WARNING), pytest.raises(RagError, match=r"index\.faiss"):
            await reader.follower.catch_up()
        assert current(reader) == (1, str(folder))
        index_file.write_bytes(content)
        await reader.follower.catch_up()
        assert current(reader)[0] == 2
