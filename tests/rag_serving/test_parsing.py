"""Bytes that are no message of the method, in all four kinds of method: refused, counted, and told by name."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2

from rag_serving.interceptors.request_id import HEADER
from tests.rag_serving.echo import SERVICE, serving
from tests.rag_serving.test_interceptors import detail, failure

METHOD = f"/{SERVICE}/Method"
GOOD = struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=1)}).SerializeToString()
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


def nested(depth: int) -> bytes:
    struct = struct_pb2.Struct()
    for _ in range(depth):
        outer = struct_pb2.Struct()
        outer.fields["a"].struct_value.CopyFrom(struct)
        struct = outer
    return struct.SerializeToString()


BAD = [b"\xff\xff\xff", GOOD[:-1], nested(200)]


def handler(kind: str) -> Any:
    """Answers each message with the number of its fields; keeps no message that was not parsed."""

    async def one(request: Any, context: Any) -> bytes:
        return bytes([len(request.fields)])

    async def joined(requests: Any, context: Any) -> bytes:
        return bytes([sum([len(each.fields) async for each in requests])])

    async def many(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield bytes([len(request.fields)])

    async def written(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for each in requests:
            yield bytes([len(each.fields)])

    functions = {"unary_unary": one, "unary_stream": many, "stream_unary": joined, "stream_stream": written}
    make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(functions[kind], request_deserializer=struct_pb2.Struct.FromString)


async def answers(channel: grpc.aio.Channel, kind: str, *given: bytes, **options: Any) -> list[bytes]:
    multi: Any = getattr(channel, kind)(METHOD)
    call = multi(iter(given) if kind.startswith("stream") else given[0], **options)
    if kind.endswith("unary"):
        return [await call]
    return [each async for each in call]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD, ids=["garbage", "truncated", "nested"])
async def test_what_cannot_be_parsed_is_refused_and_counted(kind: str, bad: bytes) -> None:
    """grpc.aio alone ended such calls with UNKNOWN, unseen by metrics, and streams with INTERNAL."""
    async with serving(extra={"Method": handler(kind)}) as pair:
        seen = await failure(answers(pair.channel, kind, bad, metadata=((HEADER, "mine"),)))
        assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (seen.details() or "").startswith("request: the message cannot be parsed: ")
        [violation] = detail(seen, error_details_pb2.BadRequest).field_violations
        assert violation.field == "request"
        assert dict(seen.trailing_metadata() or ())[HEADER] == "mine"
        assert await pair.becomes(1, "rpcs_total", method=METHOD, code="INVALID_ARGUMENT")
        assert await pair.becomes(0, "rpcs_in_flight", method=METHOD)
        assert await answers(pair.channel, kind, GOOD) == [b"\x01"]
        assert await pair.becomes(1, "rpcs_total", method=METHOD, code="OK")


async def test_a_bad_message_ends_a_stream_behind_the_answers_to_those_before() -> None:
    async with serving(extra={"Method": handler("stream_stream")}) as pair:
        call = pair.channel.stream_stream(METHOD)(iter([GOOD, nested(2), BAD[0], GOOD]))
        read = []

        async def drain() -> None:
            async for each in call:
                read.append(each)  # noqa: PERF401  (the items before the error matter)

        assert (await failure(drain())).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert read == [b"\x01", b"\x01"]


async def test_what_is_nested_as_deep_as_protobuf_allows_is_parsed() -> None:
    async with serving(extra={"Method": handler("unary_unary")}) as pair:
        assert await answers(pair.channel, "unary_unary", nested(32)) == [b"\x01"]
