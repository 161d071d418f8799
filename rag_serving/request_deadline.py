"""How much time the RPC has left that the current task works for; the deadline interceptor sets it."""

import time
from contextvars import Context, ContextVar, copy_context

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def set_request_deadline(deadline_s: float) -> None:
    """Sets it, in seconds of time.monotonic, for the rest of the current task."""
    _deadline.set(deadline_s)


def request_deadline_s() -> float | None:
    """The current RPC's deadline, in seconds of time.monotonic; None outside an RPC."""
    return _deadline.get()


def time_left_s() -> float | None:
    """Seconds until the current RPC's deadline, at least 0; None outside an RPC."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def without_deadline() -> Context:
    """Returns a context, as asyncio.create_task takes it, for a task that outlives the current RPC."""
    variables = copy_context()
    variables.run(_deadline.set, None)
    return variables
