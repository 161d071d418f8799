"""Counts RPCs by method and status code, measures their time, and shows how many run."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from rag_serving.interceptors.base import Context, RpcInterceptor
from rag_serving.metrics import Metrics

_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


class MetricsInterceptor(RpcInterceptor):
    """Keeps rag_<service>_rpcs_total, _rpc_duration_seconds and _rpcs_in_flight; stands outermost.

    Only methods that the server has are counted, so the label's values are bounded.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._total = metrics.counter("rpcs_total", "RPCs ended, by method and code", ["method", "code"])
        self._seconds = metrics.histogram("rpc_duration_seconds", "Time of RPCs, by method", ["method"])
        self._in_flight = metrics.gauge("rpcs_in_flight", "RPCs that run now, by method", ["method"])

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        """Observes one RPC."""
        started = time.perf_counter()
        in_flight = self._in_flight.labels(method)
        in_flight.inc()
        code = "OK"
        try:
            yield
            code = _code_of(context, fallback="OK")
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except BaseException:
            code = _code_of(context, fallback="UNKNOWN")
            raise
        finally:
            in_flight.dec()
            self._seconds.labels(method).observe(time.perf_counter() - started)
            self._total.labels(method, code).inc()


def _code_of(context: Context, fallback: str) -> str:
    # grpc.aio gives an int, 0 while nothing was set, where its type promises a StatusCode.
    code: Any = context.code()
    name = code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(int(code or 0), "UNKNOWN")
    return fallback if name == "OK" else name
