"""Client channels: targets, retries of calls that may run twice, replicas that come and go."""

import asyncio

import grpc
import pytest

from rag_serving.channel import RetryPolicy, open_channel, service_config, target_of
from rag_serving.errors import NotFoundError, UnavailableError
from tests.rag_serving.echo import SERVICE, Unary, serving, text_in, text_out


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("retriever:50051", "dns:///retriever:50051"),
        ("127.0.0.1:50051", "dns:///127.0.0.1:50051"),
        ("[::1]:50051", "dns:///[::1]:50051"),
        ("dns:///a.b:1", "dns:///a.b:1"),
        ("unix:/run/rag.sock", "unix:/run/rag.sock"),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
    ],
)
def test_an_address_becomes_a_dns_target_unless_it_is_one(address: str, target: str) -> None:
    assert target_of(address) == target


def test_service_config_names_methods_and_whole_services() -> None:
    config = service_config(RetryPolicy(methods=["a.B/C", "a.D"], max_attempts=4), "a.B")
    assert config["methodConfig"][0]["name"] == [{"service": "a.B", "method": "C"}, {"service": "a.D"}]
    assert config["methodConfig"][0]["retryPolicy"]["maxAttempts"] == 4
    assert config["healthCheckConfig"] == {"serviceName": "a.B"}


def failing(times: int, error: Exception) -> tuple[Unary, list[int]]:
    calls: list[int] = []

    async def method(text: str) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return text

    return method, calls


async def test_a_call_that_may_run_twice_is_sent_again_when_unavailable() -> None:
    flaky, calls = failing(2, UnavailableError("soon"))
    retry = RetryPolicy(methods=[f"{SERVICE}/Flaky"], initial_backoff_s=0.01)
    async with serving({"Flaky": flaky}, retry=retry) as pair:
        assert await pair.call("Flaky", "hello") == "hello"
    assert len(calls) == 3


async def test_other_methods_and_other_errors_are_sent_once() -> None:
    flaky, flaky_calls = failing(1, UnavailableError("soon"))
    missing, missing_calls = failing(1, NotFoundError("none"))
    retry = RetryPolicy(methods=[f"{SERVICE}/Missing"], initial_backoff_s=0.01)
    async with serving({"Flaky": flaky, "Missing": missing}, retry=retry) as pair:
        for method in ("Flaky", "Missing"):
            with pytest.raises(grpc.aio.AioRpcError):
                await pair.call(method)
    assert (len(flaky_calls), len(missing_calls)) == (1, 1)


async def test_calls_go_round_the_replicas_that_are_serving() -> None:
    async def one(text: str) -> str:
        return "one"

    async def two(text: str) -> str:
        return "two"

    async with serving({"Who": one}) as first, serving({"Who": two}) as second:
        target = f"ipv4:127.0.0.1:{first.server.port},127.0.0.1:{second.server.port}"
        first.readiness.set_met("warm")
        second.readiness.set_met("warm")
        async with open_channel(target, health_service=SERVICE) as channel:
            who = channel.unary_unary(
                f"/{SERVICE}/Who", request_serializer=text_out, response_deserializer=text_in
            )
            await who("", wait_for_ready=True, timeout=10)
            await asyncio.sleep(0.2)
            assert {await who("") for _ in range(6)} == {"one", "two"}
            first.readiness.set_unmet("warm", "lost")
            await asyncio.sleep(0.3)
            assert {await who("") for _ in range(6)} == {"two"}


async def test_nobody_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        call = channel.unary_unary("/a.B/C", request_serializer=text_out, response_deserializer=text_in)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call("")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
