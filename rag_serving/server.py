"""The gRPC server of a service: limits, interceptors, health, reflection, bind errors, graceful stop."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rag_serving.config import ServiceSettings
from rag_serving.errors import StartupError
from rag_serving.health import LIVENESS, Readiness
from rag_serving.interceptors.base import InterceptorChain, RpcInterceptor
from rag_serving.interceptors.deadline import DeadlineInterceptor
from rag_serving.interceptors.errors import ErrorInterceptor
from rag_serving.interceptors.in_flight import InFlightInterceptor
from rag_serving.interceptors.metrics import MetricsInterceptor
from rag_serving.interceptors.parsing import ParsingInterceptor
from rag_serving.interceptors.request_id import RequestIdInterceptor
from rag_serving.metrics import Metrics

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Seconds in which those who watch the health get to read NOT_SERVING before the connection closes.
_WATCHERS_HEAR_S = 0.1
# Seconds that connections without a running RPC get to close in.
_CONNECTIONS_CLOSE_S = 0.3


class GrpcServer:
    """A grpc.aio server; make it inside a running event loop, add servicers to `registrar`, then `start` it.

    The health service answers for each of `service_names`, and for "", with `readiness`; for "liveness" it is
    SERVING from `start` to `stop`. `interceptors` run inside error translation, in order.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        service_names: Sequence[str],
        readiness: Readiness,
        metrics: Metrics,
        interceptors: Sequence[RpcInterceptor] = (),
    ) -> None:
        self._settings = settings
        self._service_names = tuple(service_names)
        self._readiness = readiness
        self._in_flight = InFlightInterceptor(service_names)
        self._health = health.aio.HealthServicer()
        self._health_updates: set[asyncio.Task[None]] = set()
        self.port = 0
        self.registrar = grpc.aio.server(
            interceptors=[
                InterceptorChain(
                    [
                        RequestIdInterceptor(),
                        MetricsInterceptor(metrics),
                        self._in_flight,
                        ErrorInterceptor(),
                        *interceptors,
                        DeadlineInterceptor(settings.max_rpc_timeout_s),
                        ParsingInterceptor(),
                    ]
                )
            ],
            options=_options(settings),
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.registrar)
        reflection.enable_server_reflection(
            (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.registrar
        )

    @property
    def address(self) -> str:
        """host:port that clients of this machine can call, once started."""
        return f"{self._settings.grpc_host}:{self.port}"

    async def start(self) -> None:
        """Binds the port and answers. Raises StartupError where the port cannot be had."""
        wanted = f"{self._settings.grpc_host}:{self._settings.grpc_port}"
        try:
            self.port = self.registrar.add_insecure_port(wanted)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen for gRPC on {wanted}: the port is taken or the address is not of this"
                " machine; choose another with --grpc-host and --grpc-port"
            ) from error
        await self._health.set(LIVENESS, SERVING)
        await self._publish_readiness()
        self._readiness.on_change(self._on_readiness)
        await self.registrar.start()

    async def stop(self) -> None:
        """Says NOT_SERVING, lets running RPCs end within the drain time, then closes every connection.

        New RPCs are refused with UNAVAILABLE once `shutdown_delay_s` has passed.
        """
        self._readiness.shut_down()
        await self._health.enter_graceful_shutdown()
        if self.port:
            await asyncio.sleep(max(self._settings.shutdown_delay_s, _WATCHERS_HEAR_S))
        grace_s = self._settings.drain_timeout_s
        logger.info("draining", extra={"rpcs": self._in_flight.count, "drain_timeout_s": grace_s})
        draining = asyncio.create_task(self.registrar.stop(grace_s))
        idle = asyncio.create_task(self._in_flight.wait_idle())
        await asyncio.wait({draining, idle}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        # Connections close by themselves now, except where a health watch or a reflection stream is open.
        await asyncio.wait({draining}, timeout=_CONNECTIONS_CLOSE_S)
        if not draining.done():
            await self.registrar.stop(None)
        await draining

    def _on_readiness(self, _ready: bool) -> None:
        update = asyncio.create_task(self._publish_readiness())
        self._health_updates.add(update)
        update.add_done_callback(self._health_updates.discard)

    async def _publish_readiness(self) -> None:
        status = SERVING if self._readiness.is_ready else NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)


def _options(settings: ServiceSettings) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Without this a second server on the same port would silently share its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", int(settings.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping every 10 s, the least that the settings allow.
        ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
    ]
    if settings.max_connection_age_s > 0:
        options += [
            ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(settings.max_rpc_timeout_s * 1000)),
        ]
    return options
