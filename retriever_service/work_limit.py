"""Until when the work of a thread is wanted: it ends with the requests that wait for it, wherever it lies."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import TypeVar, TypeVarTuple

from rag_serving.errors import CancelledByCallerError, DeadlineExceededError
from rag_serving.request_deadline import request_deadline_s

ArgumentTs = TypeVarTuple("ArgumentTs")
AnswerT = TypeVar("AnswerT")


class WorkLimit:
    """The latest deadline of those who wait for some work, and word when the last of them has gone.

    A thread that does the work for one or many requests runs it inside `applied`; what waits there for something
    elsewhere asks `current_limit` how long it may, and is interrupted once nobody waits any more.
    """

    def __init__(self, deadline_s: float | None = None, num_waiting: int = 1) -> None:
        """`deadline_s` is in seconds of time.monotonic; None sets none."""
        self._deadline_s = deadline_s
        self._num_waiting = num_waiting
        self._guard = threading.Lock()
        self._interrupts: list[Callable[[], None]] = []

    @classmethod
    def latest(cls, deadlines_s: Iterable[float | None]) -> "WorkLimit":
        """Returns the limit of work that all of these wait for."""
        all_s = list(deadlines_s)
        some_s = [one for one in all_s if one is not None]
        return cls(max(some_s) if some_s and len(some_s) == len(all_s) else None, len(all_s))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Makes this the limit of what the calling thread does inside."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)

    def run(self, work: Callable[[*ArgumentTs], AnswerT], *arguments: *ArgumentTs) -> AnswerT:
        """Calls `work` inside `applied`."""
        with self.applied():
            return work(*arguments)

    def left_s(self) -> float | None:
        """Seconds until the deadline, None without one.

        Raises DeadlineExceededError where it has passed, and CancelledByCallerError where nobody waits any more.
        """
        if self._num_waiting <= 0:
            raise CancelledByCallerError("nobody waits for this any more")
        if self._deadline_s is None:
            return None
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError("the request's deadline passed before the work was done")
        return left_s

    def leave(self) -> None:
        """One fewer waits; when the last has gone, what waits inside is interrupted. Of the event loop's thread."""
        with self._guard:
            self._num_waiting -= 1
            interrupts = list(self._interrupts) if self._num_waiting <= 0 else []
        for interrupt in interrupts:
            interrupt()

    @contextlib.contextmanager
    def interrupted_by(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Has `interrupt` called, at once or from another thread, when nobody waits any more."""
        with self._guard:
            self._interrupts.append(interrupt)
            is_late = self._num_waiting <= 0
        if is_late:
            interrupt()
        try:
            yield
        finally:
            with self._guard:
                self._interrupts.remove(interrupt)


_UNLIMITED = WorkLimit()
_current: ContextVar[WorkLimit] = ContextVar("work limit", default=_UNLIMITED)


def current_limit() -> WorkLimit:
    """Returns the limit of what this thread does; one without end where none was set."""
    return _current.get()


async def run_limited(
    executor: Executor | None, work: Callable[[*ArgumentTs], AnswerT], *arguments: *ArgumentTs
) -> AnswerT:
    """Runs work for the current request in a thread, of the loop's own where there is no executor."""
    limit = WorkLimit(request_deadline_s())
    running = asyncio.get_running_loop().run_in_executor(executor, limit.run, work, *arguments)
    try:
        return await running
    except asyncio.CancelledError:
        limit.leave()
        raise
