"""The life of a service's process: start both ports, warm up, serve until a signal, drain, exit status."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import uvloop

from rag_serving.errors import RagError, StartupError
from rag_serving.garbage import kept_for_good
from rag_serving.server import GrpcServer
from rag_serving.sideport import SidePort

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_service(program: str, service: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Runs a service to its end and exits: 0 after a stop, 1 with a message where it could not start."""
    try:
        uvloop.run(service())
    except KeyboardInterrupt:
        sys.exit(130)
    except RagError as error:
        sys.stderr.write(f"{program}: error: {error.message}\n")
        sys.exit(getattr(error, "exit_status", StartupError.exit_status))
    sys.exit(0)


async def serve_until_stopped(
    server: GrpcServer,
    side_port: SidePort,
    *,
    warm_up: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Opens both ports, runs `warm_up`, serves until SIGTERM or SIGINT, then drains.

    A signal during `warm_up` cancels it and stops; what it raises ends the service. Whoever called this sets
    the conditions of readiness. A second signal ends the process at once. What the process holds when this is
    called is left out of garbage collections from then on.
    """
    stopping = asyncio.Event()
    _on_signals(stopping)
    try:
        await side_port.start()
        await server.start()
        logger.info("listening", extra={"grpc": server.address, "http": side_port.address})
        with kept_for_good():
            if warm_up is not None:
                await _unless_stopped(warm_up(), stopping)
            await stopping.wait()
        logger.info("stopping")
    finally:
        await server.stop()
        await side_port.stop()
    logger.info("stopped")


def _on_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)


async def _unless_stopped(work: Awaitable[None], stopping: asyncio.Event) -> None:
    working = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
        return
    working.result()
