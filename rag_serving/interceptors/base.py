"""Server interceptors as one async context manager about each RPC, for all four kinds of method."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc

# The stubs type handlers by request and response, which the class itself does not know: hence the quotes.
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class HandlerWrapper(ABC):
    """Puts something between the wire and a method's handler."""

    @abstractmethod
    def wrap(self, method: str, handler: Handler) -> Handler:
        """Returns a handler in the place of this one; `method` is its path, "/package.Service/Method"."""


class RpcInterceptor(HandlerWrapper):
    """Runs `around` about every RPC that has a handler."""

    @abstractmethod
    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Returns what surrounds one RPC; `method` is its path."""

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Returns a handler that runs `around` about this one."""
        if handler.response_streaming:
            return self._around_stream(method, handler)
        return self._around_unary(method, handler)

    def _around_unary(self, method: str, handler: Handler) -> Handler:
        call: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def wrapped(request: Any, context: Context) -> Any:
            async with self.around(method, context):
                return await call(request, context)

        make: Any = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return _like(handler, make, wrapped)

    def _around_stream(self, method: str, handler: Handler) -> Handler:
        call: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def wrapped(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self.around(method, context):
                responses = call(request, context)
                if inspect.isawaitable(responses):  # a handler that calls context.write itself
                    await responses
                    return
                async for response in responses:
                    yield response

        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return _like(handler, make, wrapped)


class InterceptorChain(grpc.aio.ServerInterceptor):
    """Wrappers as grpc.aio takes them, the first outermost.

    One for all, and a method's handler wrapped once: grpc.aio goes a long way about each interceptor that it is
    given, and wrapping costs more than most of what is wrapped.
    """

    def __init__(self, interceptors: Sequence[HandlerWrapper]) -> None:
        self._interceptors = tuple(interceptors)
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Wraps the method's handler; an unknown method has none and stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = handler
        for interceptor in reversed(self._interceptors):
            wrapped = interceptor.wrap(method, wrapped)
        self._wrapped[method] = handler, wrapped
        return wrapped


def _like(handler: Handler, make: Any, wrapped: Any) -> Handler:
    made: Handler = make(
        wrapped,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
