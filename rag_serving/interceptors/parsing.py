"""Refuses messages that cannot be parsed with INVALID_ARGUMENT; gRPC alone answers UNKNOWN or INTERNAL."""

import inspect
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from rag_serving.errors import InvalidArgumentError
from rag_serving.interceptors.base import Context, Handler, HandlerWrapper


@dataclass(frozen=True, slots=True)
class _Unparsed:
    """Stands in the place of a message until the handler's turn, inside of the other interceptors."""

    error: Exception


class ParsingInterceptor(HandlerWrapper):
    """Raises InvalidArgumentError, where the handler would run, for bytes that are no message of the method.

    So bytes count like any other refusal, also in the middle of a stream. Protobuf parses no message that is
    nested more than 100 deep. It stands inside of error translation.
    """

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Returns a handler that checks what was parsed."""
        if handler.request_deserializer is None:
            return handler
        kind = "_".join(
            "stream" if streaming else "unary"
            for streaming in (handler.request_streaming, handler.response_streaming)
        )
        call: Any = getattr(handler, kind)
        checked = _checked_stream if handler.request_streaming else _checked
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        made: Handler = make(
            _streaming(call, checked) if handler.response_streaming else _answering(call, checked),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return made


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError, RecursionError) as error:
            return _Unparsed(error)

    return parse


def _answering(call: Any, checked: Callable[[Any], Any]) -> Any:
    async def answer(given: Any, context: Context) -> Any:
        return await call(checked(given), context)

    return answer


def _streaming(call: Any, checked: Callable[[Any], Any]) -> Any:
    async def stream(given: Any, context: Context) -> AsyncIterator[Any]:
        responses = call(checked(given), context)
        if inspect.isawaitable(responses):  # a handler that calls context.write itself
            await responses
            return
        async for response in responses:
            yield response

    return stream


def _checked(given: Any) -> Any:
    if isinstance(given, _Unparsed):
        raise InvalidArgumentError("request", f"the message cannot be parsed: {given.error}") from given.error
    return given


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for one in requests:
        yield _checked(one)
