"""Compaction and activation in process: what is given up leaves what serves, what has ended keeps no index."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import RagError, UnavailableError
from retriever_service.corpus.base import NewDocument, Upsert
from retriever_service.generations import Description
from retriever_service.index.manifest import Embedding
from retriever_service.main import Serving
from retriever_service.operations import Operation
from tests.retriever_service.in_process import in_process
from tests.retriever_service.servicer_calls import DIM

Build = Callable[..., Any]


def writing(folder: Path, checkpoint: Path, **settings: Any) -> AbstractAsyncContextManager[Serving]:
    return in_process(folder, checkpoint, **({"search_threads": 1} | settings))


async def upsert(serving: Serving, key: str) -> None:
    embeddings = np.random.default_rng(0).standard_normal((1, DIM)).astype(np.float32)
    documents = [NewDocument(key, "", f"text of {key}")]
    await serving.maintenance.upsert(
        Upsert("", "d", documents, embeddings, False, Embedding(name="tiny-encoder"))
    )


async def ended(operation: Operation[Description]) -> Description:
    while not operation.done:  # noqa: ASYNC110  (it has no event)
        await asyncio.sleep(0.01)
    if operation.error is not None:
        raise operation.error
    assert operation.result is not None
    return operation.result


async def compact(serving: Serving) -> Description:
    return await ended(serving.maintenance.compact())


async def activate(serving: Serving, folder: Path) -> Description:
    return await ended(serving.maintenance.activate(folder.name, lambda _: None))


async def unreachable(_: Any) -> None:
    raise UnavailableError("does not warm up")


def now(serving: Serving) -> Description:
    return serving.generations.describe(serving.generations.current)


@pytest.mark.parametrize("how", ["cancelled", "not remembered", "not warm"])
async def test_folder_activated_again_and_given_up_serves_on(
    folder: Path, checkpoint: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its corpus named a number that had no index: GetIndex, changes and compactions failed until a restart."""
    async with writing(folder, checkpoint) as serving:
        await upsert(serving, "before")
        if how == "not remembered":
            (folder / "ACTIVE.new").mkdir()
        with monkeypatch.context() as patched:
            if how == "not warm":
                patched.setattr(serving.maintenance, "_warm_up", unreachable)
            operation = serving.maintenance.activate(folder.name, lambda _: None)
            if how == "cancelled":
                operation.cancelled.set()
            with pytest.raises(RagError):
                await ended(operation)
        assert (now(serving).number, now(serving).pending_changes) == (1, 1)
        await upsert(serving, "after")
        assert (await compact(serving)).number == 2
        assert (now(serving).ntotal, now(serving).pending_changes) == (62, 0)
    async with writing(folder, checkpoint) as serving:
        assert now(serving).number == 2


async def test_rollback_that_was_cancelled_can_be_made_at_once(
    folder: Path, other_folder: Path, checkpoint: Path
) -> None:
    """The number that was given up is given again, and was taken back from the one that has it now."""
    async with writing(folder, checkpoint, generations_kept=3) as serving:
        await upsert(serving, "fresh")
        await activate(serving, other_folder)
        operation = serving.maintenance.activate(folder.name, lambda _: None)
        operation.cancelled.set()
        with pytest.raises(RagError):
            await ended(operation)
        back = await activate(serving, folder)
        assert (back.number, back.ntotal, back.index_folder) == (3, 61, folder)
        await upsert(serving, "later")
        assert (await compact(serving)).number == 4


async def test_compaction_that_does_not_warm_up_stops_no_later_one(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(folder, checkpoint) as serving:
        await upsert(serving, "fresh")
        with monkeypatch.context() as patched:
            patched.setattr(serving.maintenance, "_warm_up", unreachable)
            with pytest.raises(UnavailableError):
                await compact(serving)
        assert (now(serving).number, now(serving).pending_changes) == (1, 1)
        await upsert(serving, "later")
        assert (await compact(serving)).ntotal == 62
        assert serving.generations.numbers == [1, 3]


async def test_operations_that_have_ended_keep_no_index(
    folder: Path, other_folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred were remembered with the whole index that each had made, or had failed to make current."""
    indexes = []

    def note(serving: Serving) -> None:
        indexes.append(weakref.ref(serving.generations.current.generation.index))

    async def fail(retriever: Any) -> None:
        indexes.append(weakref.ref(retriever.index))
        raise UnavailableError("does not warm up")

    async with writing(folder, checkpoint, generations_kept=1) as serving:
        note(serving)
        await compact(serving)
        note(serving)
        with monkeypatch.context() as patched:
            patched.setattr(serving.maintenance, "_warm_up", fail)
            for operation in (
                serving.maintenance.compact,
                lambda: serving.maintenance.activate(other_folder.name, lambda _: None),
            ):
                with pytest.raises(UnavailableError):
                    await ended(operation())
        await activate(serving, other_folder)
        await asyncio.sleep(0.2)
        gc.collect()
        assert [index() for index in indexes] == [None] * 4
        assert len(serving.maintenance.operations.newest_first()) == 4
