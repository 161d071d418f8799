"""The gRPC server over loopback: health, reflection, limits, bind errors, drain."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rag_serving.config import ServiceSettings
from rag_serving.errors import StartupError
from rag_serving.health import LIVENESS, Readiness
from rag_serving.metrics import Metrics
from rag_serving.server import GrpcServer
from tests.rag_serving.echo import SERVICE, serving

Status = health_pb2.HealthCheckResponse


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def echo(text: str) -> str:
    return text


async def test_health_serves_each_service_name_only_once_ready() -> None:
    async with serving() as pair:
        for name in (SERVICE, ""):
            assert await health_of(pair.channel, name) == Status.NOT_SERVING
        assert await health_of(pair.channel, LIVENESS) == Status.SERVING
        pair.readiness.set_met("warm")
        await asyncio.sleep(0.05)
        for name in (SERVICE, ""):
            assert await health_of(pair.channel, name) == Status.SERVING
        pair.readiness.set_unmet("warm", "lost")
        await asyncio.sleep(0.05)
        assert await health_of(pair.channel, SERVICE) == Status.NOT_SERVING
        assert await health_of(pair.channel, LIVENESS) == Status.SERVING


async def test_health_of_an_unknown_service_is_not_found() -> None:
    async with serving() as pair:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(pair.channel, "no.Such")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services() -> None:
    async with serving() as pair:

        def listed() -> list[str]:
            with grpc.insecure_channel(f"127.0.0.1:{pair.server.port}") as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert {SERVICE, "grpc.health.v1.Health"} <= set(await asyncio.to_thread(listed))


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving() as pair:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.call("Nothing")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_a_startup_error_that_names_it() -> None:
    async with serving() as pair:
        second = GrpcServer(
            ServiceSettings(grpc_port=pair.server.port),
            service_names=[SERVICE],
            readiness=Readiness(),
            metrics=Metrics("test"),
        )
        with pytest.raises(StartupError, match=f"127.0.0.1:{pair.server.port}.*taken.*--grpc-port"):
            await second.start()
        await second.stop()


async def test_messages_up_to_the_limit_pass_and_larger_ones_are_refused() -> None:
    async with serving({"Echo": echo}, max_message_bytes=5_000_000) as pair:
        assert len(await pair.call("Echo", "x" * 4_900_000)) == 4_900_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.call("Echo", "x" * 5_100_000)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await pair.call("Echo", "still here") == "still here"


async def test_more_rpcs_than_allowed_are_refused_with_resource_exhausted() -> None:
    release = asyncio.Event()

    async def hold(text: str) -> str:
        await release.wait()
        return text

    async with serving({"Hold": hold}, max_concurrent_rpcs=2) as pair:
        held = [asyncio.ensure_future(pair.call("Hold")) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.call("Hold")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        release.set()
        assert await asyncio.gather(*held) == ["", ""]


async def test_stop_lets_running_rpcs_end_and_refuses_new_ones() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def hold(text: str) -> str:
        entered.set()
        await release.wait()
        return "done"

    async with serving({"Hold": hold, "Echo": echo}, drain_timeout_s=20) as pair:
        pair.readiness.set_met("warm")
        running = asyncio.ensure_future(pair.call("Hold"))
        await entered.wait()
        stopping = asyncio.create_task(pair.server.stop())
        await asyncio.sleep(0.5)
        assert not pair.readiness.is_ready
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.call("Echo", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        release.set()
        assert await running == "done"
        await asyncio.wait_for(stopping, 5)


async def test_stop_cancels_what_outlasts_the_drain_time() -> None:
    entered = asyncio.Event()

    async def hold(text: str) -> str:
        entered.set()
        await asyncio.sleep(60)
        return text

    async with serving({"Hold": hold}, drain_timeout_s=0.2) as pair:
        running = asyncio.ensure_future(pair.call("Hold"))
        await entered.wait()
        await asyncio.wait_for(pair.server.stop(), 5)
        with pytest.raises(grpc.aio.AioRpcError):
            await running


async def test_stop_does_not_wait_for_health_watchers() -> None:
    """A watch never ends by itself: waiting for it would spend the whole drain time on every stop."""
    async with serving(drain_timeout_s=60) as pair:
        stub: Any = health_pb2_grpc.HealthStub(pair.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [(await watch.read()).status]
        pair.readiness.set_met("warm")
        seen.append((await watch.read()).status)
        stopping = asyncio.create_task(pair.server.stop())
        seen.append((await watch.read()).status)
        await asyncio.wait_for(stopping, 5)
        assert seen == [Status.NOT_SERVING, Status.SERVING, Status.NOT_SERVING]


async def test_stop_before_start_returns() -> None:
    server = GrpcServer(
        ServiceSettings(shutdown_delay_s=30),
        service_names=[SERVICE],
        readiness=Readiness(),
        metrics=Metrics("test"),
    )
    await asyncio.wait_for(server.stop(), 5)
