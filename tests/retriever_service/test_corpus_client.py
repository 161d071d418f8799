"""The client's methods that change the corpus, against a served retriever."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag_client import (
    AsyncRagClient,
    CorpusDocument,
    InvalidRequestError,
    RagClient,
    RefusedError,
    UnavailableError,
)
from rag_client.corpus import send_upserts, upsert_batches, upserted
from tests.retriever_service.servicer_calls import DIM
from tests.retriever_service.tiny_models import make_documents, write_jsonl

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]
Build = Callable[..., Any]
NOBODY = "127.0.0.1:1"


def some(count: int) -> tuple[list[CorpusDocument], Any]:
    documents = [CorpusDocument(f"new-{number}", f"text {number}", "t") for number in range(count)]
    return documents, np.random.default_rng(7).standard_normal((count, DIM)).astype(np.float32)


async def test_documents_are_written_listed_deleted_compacted_and_swapped(
    serve_retriever: Serve, folder: Path, port: int, tmp_path: Path, build_corpus: Build
) -> None:
    build_corpus(write_jsonl(tmp_path / "o.jsonl", make_documents(20, DIM)), tmp_path / "other")
    documents, embeddings = some(5)
    documents[0] = CorpusDocument("new-0", "text 0", "t", {"year": 1990})
    async with (
        serve_retriever(index_folder=folder, grpc_port=port),
        AsyncRagClient(NOBODY, f"127.0.0.1:{port}") as client,
    ):
        written = await client.upsert_documents(documents, embeddings, request_id="r", batch_size=2)
        assert (written.created, written.replaced, len(written.rows)) == (5, 0, 5)
        assert await client.upsert_documents(documents, embeddings, request_id="r", batch_size=2) == written
        listed = {one.key: one async for one in client.list_documents(page_size=7)}
        assert len(listed) == 65
        assert listed["new-0"].metadata == {"year": 1990}
        assert listed["new-4"] == CorpusDocument(
            "new-4", "text 4", "t", etag=written.etags[4], row=written.rows[4]
        )
        with pytest.raises(RefusedError) as refused:
            await client.delete_documents(["new-0"], etags={"new-0": "other"})
        assert refused.value.reason
        gone = await client.delete_documents(["new-0", "nobody"], request_id="d")
        assert (gone.deleted, gone.missing_keys) == (1, ["nobody"])
        assert await client.delete_documents(["new-0", "nobody"], request_id="d") == gone
        with pytest.raises(InvalidRequestError):
            await client.upsert_documents(documents, embeddings[:, :3])
        compacted = await client.compact_index()
        assert (compacted.generation, compacted.ntotal) == (2, 64)
        assert (await client.activate_index("other")).ntotal == 20
        with pytest.raises(RefusedError) as missing:
            await client.activate_index("nothing")
        assert missing.value.reason == "INDEX_MISSING"
        assert (await client.activate_index("index")).ntotal == 64


async def test_the_waiting_client_does_the_same(serve_retriever: Serve, folder: Path, port: int) -> None:
    def work() -> None:
        documents, embeddings = some(3)
        with RagClient(NOBODY, f"127.0.0.1:{port}") as client:
            assert client.upsert_documents(documents, embeddings).created == 3
            assert client.delete_documents(["new-1"]).deleted == 1
            keys = [one.key for one in client.list_documents()]
            assert len(keys) == 62
            assert "new-1" not in keys
            assert client.compact_index().ntotal == 62
            assert client.activate_index("index").ntotal == 62

    async with serve_retriever(index_folder=folder, grpc_port=port):
        await asyncio.to_thread(work)


class LosesAcknowledgements:
    """A stub whose first call writes everything, and breaks behind the first acknowledgement."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self.calls = 0

    async def UpsertDocuments(self, requests: Any, timeout: float) -> AsyncIterator[Any]:  # noqa: N802
        self.calls += 1
        responses = [one async for one in self._stub.UpsertDocuments(requests, timeout=timeout)]
        for response in responses if self.calls > 1 else responses[:1]:
            yield response
        if self.calls == 1:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost"
            )


async def test_a_lost_acknowledgement_writes_nothing_twice(serve_retriever: Serve, folder: Path) -> None:
    documents, embeddings = some(6)
    requests = upsert_batches(documents, embeddings, "r", 2, create_only=True)
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        losing = LosesAcknowledgements(stub)
        written = upserted("r", await send_upserts(losing, requests, "here", 30))
        assert losing.calls == 2
        assert (written.created, written.rows, written.sequence) == (6, list(range(60, 66)), 6)
        with pytest.raises(UnavailableError):
            await send_upserts(LosesAcknowledgements(stub), requests, "here", 0.15)


def test_what_cannot_be_sent_is_refused_before() -> None:
    documents, embeddings = some(3)
    with pytest.raises(ValueError, match=r"\[3, dim\]"):
        upsert_batches(documents, embeddings[:2], "r", 2, create_only=False)
    for given in (np.full((3, 2), "1"), np.ones((3, 2), np.bool_)):
        with pytest.raises(ValueError, match="embeddings must be numbers"):
            upsert_batches(documents, given, "r", 2, create_only=False)
    with pytest.raises(ValueError, match="batch_size"):
        upsert_batches(documents, None, "r", 0, create_only=False)
