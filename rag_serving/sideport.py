"""The HTTP side port: /livez, /readyz and /metrics, on the same event loop as the gRPC server."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from rag_serving.config import ServiceSettings
from rag_serving.errors import StartupError
from rag_serving.health import Readiness
from rag_serving.metrics import Metrics


class SidePort:
    """Serves the side port between `start` and `stop`; `port` is the one bound."""

    def __init__(self, settings: ServiceSettings, *, readiness: Readiness, metrics: Metrics) -> None:
        self._settings = settings
        self._app = _app(readiness, metrics)
        self._server: _QuietServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """host:port of the side port, once started."""
        return f"{self._settings.http_host}:{self.port}"

    async def start(self) -> None:
        """Binds the port and answers. Raises StartupError where the port cannot be had."""
        listener = _listen(self._settings.http_host, self._settings.http_port)
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            self._app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = _QuietServer(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="side port")
        # uvicorn has a flag, no event, for having started.
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Closes the port; the last answers get a second."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the service decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _app(readiness: Readiness, metrics: Metrics) -> Starlette:
    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        reasons = readiness.reasons
        if not reasons:
            return PlainTextResponse("ok\n")
        lines = "".join(f"{name}: {reason}\n" for name, reason in sorted(reasons.items()))
        return PlainTextResponse(lines, status_code=503)

    async def exposition(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", exposition)])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen for HTTP on {host}:{port}: {error.strerror or error};"
            " choose another with --http-host and --http-port"
        ) from error
    return listener
