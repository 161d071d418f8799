"""What surrounds each RPC: errors with details, deadlines, metrics, request ids, for unary and stream."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rag_serving import errors
from rag_serving.logging import request_id
from rag_serving.request_deadline import time_left_s
from rag_serving.rich_status import from_rpc_error
from tests.rag_serving.echo import SERVICE, serving


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def raising(error: BaseException) -> Any:
    async def method(text: str) -> str:
        raise error

    return method


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """Reads the details the way any Python client would, with grpcio-status."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an AioRpcError has the methods it reads
    assert status is not None
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__} in {status}")


async def test_invalid_argument_names_the_fields_in_bad_request() -> None:
    error = errors.InvalidArgumentError.of(
        [errors.FieldViolation("n_docs", "must be positive"), errors.FieldViolation("prefix", "is too long")]
    )
    async with serving({"Fail": raising(error)}) as pair:
        seen = await failure(pair.call("Fail"))
    assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = detail(seen, error_details_pb2.BadRequest).field_violations
    assert [(one.field, one.description) for one in violations] == [
        ("n_docs", "must be positive"),
        ("prefix", "is too long"),
    ]


async def test_error_info_and_retry_info_reach_the_client() -> None:
    error = errors.UnavailableError("index reloads", 1.5, reason="RELOADING", metadata={"generation": "7"})
    async with serving({"Fail": raising(error)}) as pair:
        seen = await failure(pair.call("Fail"))
    assert seen.code() is grpc.StatusCode.UNAVAILABLE
    assert seen.details() == "index reloads"
    info = detail(seen, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == ("RELOADING", "ragpair", {"generation": "7"})
    retry = detail(seen, error_details_pb2.RetryInfo)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError("labels", "is empty", reason="NO_LABELS"),
        errors.NotFoundError("no row 9", reason="ROW_NOT_FOUND", metadata={"row": "9"}),
        errors.FailedPreconditionError("dimension 384 is not 768"),
        errors.ResourceExhaustedError("queue is full", 0.25),
        errors.UnavailableError("the retriever is down", 2.0),
        errors.DeadlineExceededError("too late"),
        errors.CancelledByCallerError("gone"),
        errors.DataLossError("checksum differs"),
        errors.InternalError("broken"),
    ],
)
async def test_every_error_survives_the_wire(error: errors.RagError) -> None:
    async with serving({"Fail": raising(error)}) as pair:
        back = from_rpc_error(await failure(pair.call("Fail")))
    assert type(back) is type(error)
    assert (back.message, back.reason, back.metadata) == (error.message, error.reason, error.metadata)
    assert getattr(back, "retry_after_s", None) == getattr(error, "retry_after_s", None)
    assert getattr(back, "violations", None) == getattr(error, "violations", None)


async def test_a_huge_error_still_reaches_the_client_with_its_status() -> None:
    """Metadata above a client's 8 KiB would otherwise turn the error into RESOURCE_EXHAUSTED."""
    violations = [errors.FieldViolation(f"inputs[{row}]", "é" * 5000) for row in range(500)]
    async with serving({"Fail": raising(errors.InvalidArgumentError.of(violations))}) as pair:
        seen = await failure(pair.call("Fail"))
    assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(seen, error_details_pb2.BadRequest).field_violations[0].field == "inputs[0]"


async def test_huge_facts_about_an_error_still_reach_the_client_with_its_status() -> None:
    """Only the message and the violations were cut: a long expectation came back as RESOURCE_EXHAUSTED."""
    facts = {"field": "embedding_model"} | {f"fact_{number}": "é" * 8000 for number in range(50)}
    error = errors.FailedPreconditionError("é" * 8000, reason="MISMATCH", metadata=facts)
    async with serving({"Fail": raising(error)}) as pair:
        seen = await failure(pair.call("Fail"))
    assert seen.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = detail(seen, error_details_pb2.ErrorInfo)
    assert (info.reason, info.metadata["field"]) == ("MISMATCH", "embedding_model")
    assert info.metadata["fact_0"].startswith("ééé")
    assert info.metadata["fact_0"].endswith("…")


async def test_an_unknown_fault_is_internal_with_an_id_and_shows_no_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving({"Fail": raising(KeyError("password"))}) as pair:
        with caplog.at_level(logging.ERROR):
            seen = await failure(pair.call("Fail"))
        assert seen.code() is grpc.StatusCode.INTERNAL
        assert "password" not in (seen.details() or "")
        error_id = detail(seen, error_details_pb2.ErrorInfo).metadata["error_id"]
        assert error_id in (seen.details() or "")
        [record] = [one for one in caplog.records if one.name == "rag_serving.interceptors.errors"]
        assert vars(record)["error_id"] == error_id
        assert record.exc_info is not None


async def test_a_stream_that_fails_midway_gives_its_items_and_then_the_error() -> None:
    async def count(text: str) -> AsyncIterator[str]:
        yield "1"
        yield "2"
        raise errors.DataLossError("row 3 is damaged")

    async with serving(stream={"Count": count}) as pair:
        items = []

        async def read() -> None:
            async for item in pair.stream("Count"):
                items.append(item)  # noqa: PERF401  (the items before the error matter)

        seen = await failure(read())
        assert items == ["1", "2"]
        assert seen.code() is grpc.StatusCode.DATA_LOSS
        assert detail(seen, error_details_pb2.ErrorInfo).reason == "DATA_LOSS"
        assert await pair.becomes(1, "rpcs_total", method=f"/{SERVICE}/Count", code="DATA_LOSS")


async def test_a_handler_sees_the_time_left_of_its_caller() -> None:
    async def left(text: str) -> str:
        return str(time_left_s())

    async with serving({"Left": left}, max_rpc_timeout_s=100) as pair:
        assert 4 < float(await pair.call("Left", timeout=5)) < 5.1  # gRPC rounds a deadline up
        assert 99 < float(await pair.call("Left")) <= 100
        assert 99 < float(await pair.call("Left", timeout=5000)) <= 100
    assert time_left_s() is None


async def test_a_handler_is_cancelled_when_the_longest_allowed_time_is_up() -> None:
    cancelled = asyncio.Event()

    async def forever(text: str) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return text

    async with serving({"Forever": forever}, max_rpc_timeout_s=0.2) as pair:
        seen = await failure(pair.call("Forever"))
        assert seen.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert detail(seen, error_details_pb2.ErrorInfo).reason == "DEADLINE_EXCEEDED"
        assert cancelled.is_set()
        assert await pair.becomes(1, "rpcs_total", method=f"/{SERVICE}/Forever", code="DEADLINE_EXCEEDED")


async def test_a_stream_is_cut_when_its_time_is_up() -> None:
    async def drip(text: str) -> AsyncIterator[str]:
        while True:
            yield "drop"
            await asyncio.sleep(0.02)

    async with serving(stream={"Drip": drip}, max_rpc_timeout_s=0.2) as pair:
        items = []

        async def read() -> None:
            async for item in pair.stream("Drip"):
                items.append(item)  # noqa: PERF401  (the items before the error matter)

        assert (await failure(read())).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(items) > 2


async def test_a_timeout_inside_a_handler_is_not_taken_for_the_deadline() -> None:
    async with serving({"Fail": raising(TimeoutError("a lock"))}) as pair:
        assert (await failure(pair.call("Fail"))).code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_caller_that_cancels_cancels_the_handler(kind: str) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(text: str) -> str:
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return text

    async def drip(text: str) -> AsyncIterator[str]:
        yield await wait(text)

    async with serving({"Wait": wait}, {"Drip": drip}) as pair:
        call = pair.call("Wait") if kind == "unary" else pair.stream("Drip")
        reading = asyncio.ensure_future(call.read() if kind == "stream" else call.code())
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 5)
        await asyncio.wait([reading])
        await asyncio.sleep(0.05)
        method = f"/{SERVICE}/{'Wait' if kind == 'unary' else 'Drip'}"
        assert await pair.becomes(1, "rpcs_total", method=method, code="CANCELLED")
        assert await pair.becomes(0, "rpcs_in_flight", method=method)


async def test_metrics_count_by_method_and_code_and_know_what_runs() -> None:
    release = asyncio.Event()

    async def hold(text: str) -> str:
        await release.wait()
        return text

    async with serving({"Hold": hold, "Fail": raising(errors.NotFoundError("none"))}) as pair:
        held = asyncio.ensure_future(pair.call("Hold"))
        await failure(pair.call("Fail"))
        assert await pair.becomes(1, "rpcs_in_flight", method=f"/{SERVICE}/Hold")
        release.set()
        await held
        await asyncio.sleep(0.05)
        assert await pair.becomes(0, "rpcs_in_flight", method=f"/{SERVICE}/Hold")
        assert await pair.becomes(1, "rpcs_total", method=f"/{SERVICE}/Hold", code="OK")
        assert await pair.becomes(1, "rpcs_total", method=f"/{SERVICE}/Fail", code="NOT_FOUND")
        assert await pair.becomes(1, "rpc_duration_seconds_count", method=f"/{SERVICE}/Hold")


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream", "unary_stream"])
async def test_all_kinds_of_methods_are_surrounded(kind: str) -> None:
    """One handler of each kind fails after its first answer; handlers may also write for themselves."""

    async def joined(requests: Any, context: Any) -> bytes:
        assert b"".join([item async for item in requests]) == b"ab"
        raise errors.NotFoundError("none")

    async def echoed(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for item in requests:
            yield item
        raise errors.NotFoundError("none")

    async def written(request: bytes, context: Any) -> None:
        await context.write(request)
        raise errors.NotFoundError("none")

    made: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = made({"stream_unary": joined, "stream_stream": echoed, "unary_stream": written}[kind])
    async with serving(extra={"Method": handler}) as pair:
        multi: Any = getattr(pair.channel, kind)(f"/{SERVICE}/Method")
        call = multi(iter([b"a", b"b"]) if kind.startswith("stream") else b"ab")
        read = []

        async def drain() -> None:
            async for item in call:
                read.append(item)  # noqa: PERF401  (the items before the error matter)

        seen = await failure(call if kind == "stream_unary" else drain())
        assert seen.code() is grpc.StatusCode.NOT_FOUND
        assert detail(seen, error_details_pb2.ErrorInfo).reason == "NOT_FOUND"
        assert b"".join(read) == (b"" if kind == "stream_unary" else b"ab")
        assert await pair.becomes(1, "rpcs_total", method=f"/{SERVICE}/Method", code="NOT_FOUND")


async def test_request_id_of_the_caller_is_kept_and_returned() -> None:
    async def current(text: str) -> str:
        return request_id.get()

    async with serving({"Current": current}) as pair:
        call = pair.call("Current", metadata=(("x-request-id", "abc-1"),))
        assert await call == "abc-1"
        assert ("x-request-id", "abc-1") in list(await call.trailing_metadata())
        made = await pair.call("Current")
        forged = await pair.call("Current", metadata=(("x-request-id", "no spaces allowed"),))
        assert len(made) == len(forged) == 32
        assert made != forged


async def test_request_id_comes_back_with_an_error_too() -> None:
    async with serving({"Fail": raising(errors.NotFoundError("none"))}) as pair:
        seen = await failure(pair.call("Fail", metadata=(("x-request-id", "abc-2"),)))
        assert ("x-request-id", "abc-2") in list(seen.trailing_metadata())
