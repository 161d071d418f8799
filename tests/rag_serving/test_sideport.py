"""The side port: liveness, readiness with reasons, metrics, a taken port."""

import asyncio
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rag_serving.config import ServiceSettings
from rag_serving.errors import StartupError
from rag_serving.health import Readiness
from rag_serving.metrics import Metrics
from rag_serving.sideport import SidePort


@asynccontextmanager
async def side_port(readiness: Readiness, metrics: Metrics | None = None) -> AsyncIterator[SidePort]:
    port = SidePort(ServiceSettings(), readiness=readiness, metrics=metrics or Metrics("test"))
    await port.start()
    try:
        yield port
    finally:
        await port.stop()


async def get(port: SidePort, path: str, accept: str = "*/*") -> tuple[int, str, str]:
    def fetch() -> tuple[int, str, str]:
        request = urllib.request.Request(f"http://{port.address}{path}", headers={"accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read().decode(), answer.headers["content-type"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers["content-type"]

    return await asyncio.to_thread(fetch)


async def test_readyz_tells_why_not_and_livez_stays_ok() -> None:
    readiness = Readiness("index", "store")
    async with side_port(readiness) as port:
        readiness.set_unmet("index", "var/index has no manifest")
        assert await get(port, "/livez") == (200, "ok\n", "text/plain; charset=utf-8")
        status, text, _ = await get(port, "/readyz")
        assert (status, text) == (503, "index: var/index has no manifest\nstore: starting\n")
        readiness.set_met("index")
        readiness.set_met("store")
        assert (await get(port, "/readyz"))[:2] == (200, "ok\n")
        readiness.shut_down()
        assert (await get(port, "/readyz"))[:2] == (503, "shutdown: shutting down\n")


async def test_metrics_are_exposed_in_the_format_asked_for() -> None:
    metrics = Metrics("test")
    metrics.counter("questions_total", "Questions").inc(3)
    async with side_port(Readiness(), metrics) as port:
        status, text, kind = await get(port, "/metrics")
        assert status == 200
        assert kind.startswith("text/plain")
        assert "rag_test_questions_total 3.0" in text
        assert "process_cpu_seconds_total" in text
        openmetrics = await get(port, "/metrics", "application/openmetrics-text; version=1.0.0")
        assert openmetrics[1].endswith("# EOF\n")


async def test_an_unknown_path_is_404() -> None:
    async with side_port(Readiness()) as port:
        assert (await get(port, "/nothing"))[0] == 404


async def test_a_taken_port_is_a_startup_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        port = SidePort(ServiceSettings(http_port=number), readiness=Readiness(), metrics=Metrics("test"))
        with pytest.raises(StartupError, match=f"127.0.0.1:{number}: .*in use.*--http-port"):
            await port.start()
        await port.stop()
