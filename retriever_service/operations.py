"""Long operations: begun at once, watched and cancelled by name; one runs at a time."""

import asyncio
import itertools
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rag_serving.errors import CancelledByCallerError, InternalError, RagError
from rag_serving.request_deadline import without_deadline
from retriever_service.errors import OperationNotFoundError, OperationRunningError

logger = logging.getLogger(__name__)

_REMEMBERED = 100
ResultT = TypeVar("ResultT")


@dataclass(eq=False, slots=True)
class Operation(Generic[ResultT]):
    """One operation. The thread that does the work reports; everybody else reads.

    Once `done`, either `error` or `result` is set, and kept: neither may hold an index. `create_time_s` is in
    seconds since the epoch.
    """

    name: str
    create_time_s: float = field(default_factory=time.time)
    stage: str = "waiting"
    done_documents: int = 0
    total_documents: int = 0
    done: bool = False
    error: RagError | None = None
    result: ResultT | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Hears how the work goes on: see corpus.base.Progress."""
        self.stage, self.done_documents, self.total_documents = stage, done, total or 0

    def check(self) -> None:
        """Raises CancelledByCallerError once the operation was asked to stop."""
        if self.cancelled.is_set():
            raise CancelledByCallerError("the operation was cancelled")


class Operations(Generic[ResultT]):
    """The operations of this process. All methods belong to the event loop's thread."""

    def __init__(self) -> None:
        self._operations: OrderedDict[str, Operation[ResultT]] = OrderedDict()
        self._numbers = itertools.count(1)
        self._process = uuid.uuid4().hex[:8]
        self._running: asyncio.Task[None] | None = None

    def start(
        self, verb: str, work: Callable[[Operation[ResultT]], Awaitable[ResultT]]
    ) -> Operation[ResultT]:
        """Begins `work`, which reports to its operation. Raises OperationRunningError while another runs."""
        if self._running is not None and not self._running.done():
            running = next(reversed(self._operations))
            raise OperationRunningError(
                f"{running} is running: wait for it, or cancel it", metadata={"operation": running}
            )
        operation: Operation[ResultT] = Operation(f"operations/{verb}-{self._process}-{next(self._numbers)}")
        self._operations[operation.name] = operation
        while len(self._operations) > _REMEMBERED:
            self._operations.popitem(last=False)
        self._running = asyncio.create_task(
            self._run(operation, work), name=operation.name, context=without_deadline()
        )
        return operation

    def get(self, name: str) -> Operation[ResultT]:
        """Returns an operation. Raises OperationNotFoundError."""
        if name not in self._operations:
            raise OperationNotFoundError(f"name: no operation {name!r} in this process")
        return self._operations[name]

    def newest_first(self) -> list[Operation[ResultT]]:
        """Returns those that are remembered."""
        return list(reversed(self._operations.values()))

    def cancel(self, name: str) -> Operation[ResultT]:
        """Asks an operation to stop; one that is done stays as it ended. Raises OperationNotFoundError."""
        operation = self.get(name)
        operation.cancelled.set()
        return operation

    async def close(self) -> None:
        """Stops what runs, and waits for it."""
        if self._running is not None:
            next(reversed(self._operations.values())).cancelled.set()
            await asyncio.wait([self._running])

    async def _run(
        self, operation: Operation[ResultT], work: Callable[[Operation[ResultT]], Awaitable[ResultT]]
    ) -> None:
        try:
            operation.result = await work(operation)
            logger.info("operation done", extra={"operation": operation.name})
        except RagError as error:
            operation.error = error
            # Its frames, and those of what caused it, hold whatever the operation had opened.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            logger.warning("operation failed", extra={"operation": operation.name, "reason": error.message})
        except Exception:
            logger.exception("operation failed", extra={"operation": operation.name})
            operation.error = InternalError("the operation failed; the service's log tells more")
        finally:
            operation.done = True
