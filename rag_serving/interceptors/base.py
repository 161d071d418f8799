"""Server interceptors as one async context manager about each RPC, for all four kinds of method."""

import inspect
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc

# The stubs type handlers by request and response, which the class itself does not know: hence the quotes.
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Runs `around` about every RPC that has a handler."""

    @abstractmethod
    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Returns what surrounds one RPC; `method` is its path, "/package.Service/Method"."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Wraps the method's handler; an unknown method has none and stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
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


def _like(handler: Handler, make: Any, wrapped: Any) -> Handler:
    made: Handler = make(
        wrapped,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
