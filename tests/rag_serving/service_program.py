"""A whole service as a process, for tests of signals and exit statuses."""

import asyncio
import gc
import sys

from rag_serving.config import ServiceSettings, load_settings
from rag_serving.errors import StartupError
from rag_serving.health import Readiness
from rag_serving.logging import configure_logging
from rag_serving.metrics import Metrics
from rag_serving.process import run_service, serve_until_stopped
from rag_serving.server import GrpcServer
from rag_serving.sideport import SidePort
from tests.rag_serving.echo import SERVICE, add_methods


class Settings(ServiceSettings):
    """The test service."""

    warm_up: str = "fast"


async def slow(text: str) -> str:
    await asyncio.sleep(float(text))
    return "finished"


async def collected(_text: str) -> str:
    """Says how many objects a full garbage collection walks through, and how many it leaves out."""
    gc.collect()
    return f"{len(gc.get_objects())} {gc.get_freeze_count()}"


async def service(settings: Settings) -> None:
    configure_logging(settings.log_level, settings.log_format)
    readiness, metrics = Readiness("warm"), Metrics("test")
    server = GrpcServer(settings, service_names=[SERVICE], readiness=readiness, metrics=metrics)
    add_methods(server.registrar, {"Slow": slow, "Collected": collected}, {})

    async def warm_up() -> None:
        if settings.warm_up == "fail":
            raise StartupError("no index in var/index: build one with rag-index build")
        await asyncio.sleep(60 if settings.warm_up == "slow" else 0)
        readiness.set_met("warm")
        print("warm", flush=True)

    side_port = SidePort(settings, readiness=readiness, metrics=metrics)
    await serve_until_stopped(server, side_port, warm_up=warm_up)


if __name__ == "__main__":
    loaded = load_settings(Settings, env_prefix="RAG_TEST_", argv=sys.argv[1:])
    run_service("rag-test", lambda: service(loaded))
