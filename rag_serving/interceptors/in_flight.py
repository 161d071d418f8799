"""Knows how many RPCs of the service's own methods run, so that a stop waits no longer than they do."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rag_serving.interceptors.base import Context, RpcInterceptor


class InFlightInterceptor(RpcInterceptor):
    """Counts running RPCs of `service_names` only: watches of health may stay open for ever."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._prefixes = tuple(f"/{name}/" for name in service_names)
        self._idle = asyncio.Event()
        self._idle.set()
        self.count = 0

    async def wait_idle(self) -> None:
        """Returns once none runs."""
        await self._idle.wait()

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        """Counts one RPC."""
        if not method.startswith(self._prefixes):
            yield
            return
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if self.count == 0:
                self._idle.set()
