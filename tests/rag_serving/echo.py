"""A small service to test the plumbing with: each method is a coroutine of one text."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from rag_serving.channel import RetryPolicy, open_channel
from rag_serving.config import ServiceSettings
from rag_serving.health import Readiness
from rag_serving.metrics import Metrics
from rag_serving.server import GrpcServer

SERVICE = "test.Echo"
Unary = Callable[[str], Awaitable[str]]
Stream = Callable[[str], AsyncIterator[str]]


def text_out(text: str | bytes) -> bytes:
    # grpc.aio turns a handler's str into bytes before it calls the serializer; messages it leaves alone.
    return text if isinstance(text, bytes) else text.encode()


def text_in(data: bytes) -> str:
    return data.decode()


def add_methods(
    registrar: Any, unary: dict[str, Unary], stream: dict[str, Stream], extra: dict[str, Any] | None = None
) -> None:
    def with_context(function: Any) -> Any:
        async def answer(request: str, context: Any) -> str:
            return await function(request)

        return answer

    def stream_with_context(function: Any) -> Any:
        async def answer(request: str, context: Any) -> AsyncIterator[str]:
            async for item in function(request):
                yield item

        return answer

    codecs: Any = {"request_deserializer": text_in, "response_serializer": text_out}
    handlers = {
        **{
            name: grpc.unary_unary_rpc_method_handler(with_context(function), **codecs)
            for name, function in unary.items()
        },
        **{
            name: grpc.unary_stream_rpc_method_handler(stream_with_context(function), **codecs)
            for name, function in stream.items()
        },
        **(extra or {}),
    }
    registrar.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])


@dataclass
class Echo:
    """A running server and a channel to it."""

    server: GrpcServer
    readiness: Readiness
    metrics: Metrics
    channel: grpc.aio.Channel

    def call(self, method: str, text: str = "", **options: Any) -> Any:
        multi: Any = self.channel.unary_unary(
            f"/{SERVICE}/{method}", request_serializer=text_out, response_deserializer=text_in
        )
        return multi(text, **options)

    def stream(self, method: str, text: str = "", **options: Any) -> Any:
        multi: Any = self.channel.unary_stream(
            f"/{SERVICE}/{method}", request_serializer=text_out, response_deserializer=text_in
        )
        return multi(text, **options)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"rag_test_{name}", labels)

    async def becomes(self, expected: float, name: str, **labels: str) -> bool:
        """Whether a sample has this value soon: a client may have its status before the server has counted it."""
        for _ in range(500):
            if self.sample(name, **labels) == expected:
                return True
            await asyncio.sleep(0.01)
        return False


@asynccontextmanager
async def serving(
    unary: dict[str, Unary] | None = None,
    stream: dict[str, Stream] | None = None,
    extra: dict[str, Any] | None = None,
    retry: RetryPolicy | None = None,
    health_service: str | None = None,
    **settings: Any,
) -> AsyncIterator[Echo]:
    readiness = Readiness("warm")
    metrics = Metrics("test")
    server = GrpcServer(
        ServiceSettings(**settings), service_names=[SERVICE], readiness=readiness, metrics=metrics
    )
    add_methods(server.registrar, unary or {}, stream or {}, extra)
    await server.start()
    channel = open_channel(f"127.0.0.1:{server.port}", retry=retry, health_service=health_service)
    try:
        yield Echo(server, readiness, metrics, channel)
    finally:
        await channel.close()
        await server.stop()
