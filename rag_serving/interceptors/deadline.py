"""Ends RPCs whose time is up and tells the code below how much time is left."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rag_serving.errors import DeadlineExceededError
from rag_serving.interceptors.base import Context, RpcInterceptor
from rag_serving.request_deadline import set_request_deadline


class DeadlineInterceptor(RpcInterceptor):
    """Cancels a handler at the caller's deadline, or after `max_timeout_s` seconds where that comes first."""

    def __init__(self, max_timeout_s: float) -> None:
        self.max_timeout_s = max_timeout_s

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        """Bounds one RPC; raises DeadlineExceededError when its time is up."""
        # None where the caller set no deadline, whatever the type says.
        asked: float | None = context.time_remaining()
        timeout_s = self.max_timeout_s if asked is None else min(asked, self.max_timeout_s)
        if timeout_s <= 0:
            raise DeadlineExceededError(f"{method}: the deadline had passed before the work began")
        # Never reset: each RPC runs in a task, and so in a context, of its own.
        set_request_deadline(time.monotonic() + timeout_s)
        scope = asyncio.timeout(timeout_s)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(f"{method}: not done within {timeout_s:.3f} s") from error
