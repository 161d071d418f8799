"""A Milvus that answers as a test says: what milvus-lite cannot do, and how calls fail."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from retriever_service.milvus.connection import MilvusAddress, MilvusConnection

FOR_EVER_S = 600.0  # of a call that nothing ends: more than a test may take


class FakeMilvus(milvus_pb2_grpc.MilvusServiceServicer):
    """Lists its collections, as `answer` says, and takes indexes; notes what it was asked."""

    def __init__(self) -> None:
        self.given_s: list[float] = []
        self.answer: Callable[[grpc.ServicerContext], Any] = lambda _: milvus_pb2.ShowCollectionsResponse()
        self.entered = threading.Event()
        self.ended = threading.Event()
        self.indexes: list[Any] = []
        self.takes_index = common_pb2.Status()

    def Connect(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return milvus_pb2.ConnectResponse(identifier=1)

    def ShowCollections(self, _request: Any, context: Any) -> Any:  # noqa: N802
        self.given_s.append(context.time_remaining())
        context.add_callback(self.ended.set)
        self.entered.set()
        return self.answer(context)

    def CreateIndex(self, request: Any, _context: Any) -> Any:  # noqa: N802
        self.indexes.append(request)
        return self.takes_index

    def hang(self, _context: Any) -> Any:
        """Answers when the caller has gone."""
        self.ended.wait()
        return milvus_pb2.ShowCollectionsResponse()

    def forget(self) -> None:
        """Begins anew to note what it is asked."""
        self.given_s.clear()
        # Of the calls so far, some may not have ended for the server yet.
        self.entered, self.ended = threading.Event(), threading.Event()


@contextlib.contextmanager
def connected() -> Iterator[tuple[FakeMilvus, MilvusConnection]]:
    """Serves one, and connects to it."""
    fake = FakeMilvus()
    server = grpc.server(ThreadPoolExecutor(4))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = MilvusConnection(MilvusAddress(f"http://127.0.0.1:{port}", timeout_s=FOR_EVER_S))
    fake.forget()
    try:
        yield fake, connection
    finally:
        connection.close()
        server.stop(None).wait()
