"""Ends RPCs whose time is up and tells the code below how much time is left."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context as Variables
from contextvars import ContextVar, copy_context

from rag_serving.errors import DeadlineExceededError
from rag_serving.interceptors.base import Context, RpcInterceptor

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def time_left_s() -> float | None:
    """Seconds until the current RPC's deadline, at least 0; None outside an RPC."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def request_deadline_s() -> float | None:
    """The current RPC's deadline, in seconds of time.monotonic; None outside an RPC."""
    return _deadline.get()


def without_deadline() -> Variables:
    """Returns a context, as asyncio.create_task takes it, for a task that outlives the current RPC."""
    variables = copy_context()
    variables.run(_deadline.set, None)
    return variables


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
        _deadline.set(time.monotonic() + timeout_s)
        scope = asyncio.timeout(timeout_s)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(f"{method}: not done within {timeout_s:.3f} s") from error
