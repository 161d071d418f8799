"""Deadlines, cancellations, retries and pings of what is asked of Milvus."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from pymilvus.grpc_gen import common_pb2, milvus_pb2

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving.errors import (
    CancelledByCallerError,
    DeadlineExceededError,
    StartupError,
    UnavailableError,
)
from rag_serving.interceptors.deadline import DeadlineInterceptor
from rag_serving.request_deadline import request_deadline_s
from retriever_service.errors import DiskFullError
from retriever_service.milvus.connection import MilvusAddress, MilvusConnection
from retriever_service.operations import Operations
from retriever_service.work_limit import WorkLimit, current_limit
from tests.retriever_service.fake_milvus import FOR_EVER_S, FakeMilvus, connected
from tests.retriever_service.milvus_server import MilvusServer
from tests.retriever_service.servicer_calls import request, tensor
from tests.retriever_service.test_corpus import vector


@pytest.fixture
def fake() -> Iterator[tuple[FakeMilvus, MilvusConnection]]:
    with connected() as both:
        yield both


def limit_of(seconds: float) -> WorkLimit:
    return WorkLimit(time.monotonic() + seconds)


def test_a_call_has_the_time_of_its_request_and_no_more(fake: Any) -> None:
    servicer, connection = fake
    servicer.answer = servicer.hang
    with pytest.raises(DeadlineExceededError):
        limit_of(0.3).run(connection.call, "list_collections")
    assert servicer.ended.wait(60)
    assert servicer.given_s.pop() < 1  # gRPC rounds up
    servicer.forget()
    with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
        limit_of(FOR_EVER_S).run(lambda: connection.call("list_collections", timeout_s=0.3))
    with pytest.raises(DeadlineExceededError):
        limit_of(-1.0).run(connection.call, "list_collections")
    assert len(servicer.given_s) == 1, "asked for nobody"


def test_a_call_ends_when_the_last_request_was_cancelled(fake: Any) -> None:
    servicer, connection = fake
    servicer.answer = servicer.hang
    limit = WorkLimit.latest([None, time.monotonic() + 1])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(limit.run, connection.call, "list_collections")
        assert servicer.entered.wait(60)
        limit.leave()
        assert not servicer.ended.is_set()
        limit.leave()
        with pytest.raises(CancelledByCallerError):
            running.result(60)
    assert servicer.ended.wait(60)


def test_tries_after_a_lost_connection_end_with_the_request(fake: Any) -> None:
    servicer, connection = fake
    servicer.answer = lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
    with pytest.raises(DeadlineExceededError):
        limit_of(0.5).run(connection.call, "list_collections")
    assert len(servicer.given_s) > 2
    assert servicer.given_s[-1] < servicer.given_s[0] < 1
    with pytest.raises(UnavailableError, match="starting"):
        connection.call("list_collections", timeout_s=0.5)
    servicer.answer = lambda _: milvus_pb2.ShowCollectionsResponse(collection_names=["there"])
    assert connection.call("list_collections") == ["there"]


def test_a_wait_between_two_tries_ends_with_the_last_request(fake: Any, monkeypatch: Any) -> None:
    servicer, connection = fake
    monkeypatch.setattr("retriever_service.milvus.channel._FIRST_PAUSE_S", FOR_EVER_S)
    servicer.answer = lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
    limit = WorkLimit()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(limit.run, connection.call, "list_collections")
        assert servicer.ended.wait(60)
        limit.leave()
        with pytest.raises(CancelledByCallerError):
            running.result(60)


def test_a_request_with_a_deadline_hears_at_once_that_milvus_takes_no_more(fake: Any) -> None:
    """pymilvus would try again, with pauses of seconds, until the deadline."""
    servicer, connection = fake
    refused = common_pb2.Status(code=8, reason="rate limit exceeded")
    servicer.answer = lambda _: milvus_pb2.ShowCollectionsResponse(status=refused)
    with pytest.raises(DiskFullError, match="rate limit"):
        limit_of(FOR_EVER_S).run(connection.call, "list_collections")
    assert len(servicer.given_s) == 1


def test_limits_are_a_threads_own_and_the_latest_of_many() -> None:
    assert current_limit().left_s() is None
    with limit_of(5).applied():
        left_s = current_limit().left_s()
        assert left_s is not None
        assert 0 < left_s <= 5
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: current_limit().left_s()).result() is None
    assert current_limit().left_s() is None
    now_s = time.monotonic()
    latest_s = WorkLimit.latest([now_s + 5, now_s + 50]).left_s()
    assert latest_s is not None
    assert latest_s > 5
    assert WorkLimit.latest([now_s + 5, None]).left_s() is None


def test_an_idle_connection_does_not_ping(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers with gRPC's own limits end a connection that pings each few minutes, or in idle hours."""
    made: list[dict[str, Any]] = []
    make = grpc.insecure_channel

    def insecure_channel(target: str, options: Any = None, **named: Any) -> grpc.Channel:
        made.append(dict(options or ()))
        return make(target, options, **named)

    monkeypatch.setattr(grpc, "insecure_channel", insecure_channel)
    servicer, connection = fake
    second = MilvusConnection(connection.address)
    servicer.answer = lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
    with pytest.raises(UnavailableError):  # after which pymilvus would connect anew, in its own way
        second.call("list_collections", timeout_s=0.2)
    second.close()
    assert len(made) == 1
    assert made[0]["grpc.keepalive_permit_without_calls"] == 0
    assert made[0]["grpc.keepalive_time_ms"] >= 300_000


async def test_an_operation_outlives_the_deadline_of_the_call_that_began_it() -> None:
    """Its warm-up would find no time left to search in."""
    seen: list[float | None] = []

    async def work(_operation: Any) -> None:
        seen.append(request_deadline_s())
        ended.set()

    async def call(_request: Any, _context: Any) -> None:
        seen.append(request_deadline_s())
        operation = operations.start("compact", work)
        assert operations.get(operation.name) is operation
        await ended.wait()

    ended = asyncio.Event()
    operations: Operations[None] = Operations()
    interceptor = DeadlineInterceptor(60)
    context = SimpleNamespace(time_remaining=lambda: None)
    async with interceptor.around("/s/m", cast(Any, context)):
        await call(None, context)
    assert seen[0] is not None
    assert seen[1] is None
    await operations.close()


def test_addresses_name_one_milvus() -> None:
    with pytest.raises(StartupError, match="several clusters"):
        MilvusConnection(MilvusAddress("https://glo-1.global-cluster.example"))


@contextlib.contextmanager
def silent(milvus: MilvusServer) -> Iterator[None]:
    """Milvus takes calls and answers none, as behind a lost network."""
    assert milvus.pid is not None
    os.kill(milvus.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(milvus.pid, signal.SIGCONT)


@pytest.fixture
def backend() -> str:
    return "milvus"


async def test_requests_end_in_time_while_milvus_is_silent_and_hold_no_thread(
    milvus: MilvusServer, serve_retriever: Any, folder: Path
) -> None:
    batch = retriever_service_pb2.UpsertDocumentsRequest(
        documents=[document_pb2.Document(key="a", text="t")], embeddings=tensor(vector(1)[None])
    )
    keys = retriever_service_pb2.GetDocumentsRequest(keys=["a"])
    first = retriever_service_pb2.ListDocumentsRequest()
    async with serve_retriever(index_folder=folder, milvus_timeout_s=FOR_EVER_S) as (retriever, stub, _):
        answer = await stub.Retrieve(request(n_docs=2))
        with silent(milvus):
            for call in (
                stub.Retrieve(request(n_docs=2), timeout=0.3),
                stub.GetDocuments(keys, timeout=0.3),
                stub.ListDocuments(first, timeout=0.3),
                stub.UpsertDocuments(iter([batch]), timeout=0.3).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            cancelled = stub.Retrieve(request(n_docs=2))
            while True:
                await asyncio.sleep(0.01)
                if retriever._questions_in_flight:
                    break
            cancelled.cancel()
            for executor in (retriever._search_executor, retriever._reading, retriever._assembling):
                await asyncio.wrap_future(executor.submit(lambda: None))
        assert await stub.Retrieve(request(n_docs=2)) == answer
        assert (await stub.UpsertDocuments(iter([batch])).read()).created == 1
        assert len((await stub.GetDocuments(keys)).documents) == 1
