"""Long operations of the retriever: compactions and activations, as a caller follows them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from rag.retriever.v1 import retriever_service_pb2
from rag_client import messages
from rag_client.errors import RagClientError, error_of
from rag_client.types import IndexInfo

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Operation:
    """How far an operation is: `done_documents` of `total_documents`, 0 where that is not known, in its `stage`.

    Once `done` it has the `error` that it failed with, or the `index` that serves now. `create_time_s` is in
    seconds since the epoch.
    """

    name: str
    stage: str
    done_documents: int
    total_documents: int
    create_time_s: float
    done: bool
    error: RagClientError | None = None
    index: IndexInfo | None = None

    def outcome(self) -> IndexInfo:
        """Returns the index of an operation that is done. Raises RagClientError where it failed."""
        if self.error is not None:
            raise self.error
        if self.index is None:
            raise ValueError(f"{self.name} is not done")
        return self.index


def operation_of(message: retriever_service_pb2.Operation, address: str) -> Operation:
    """Returns what a message says about an operation at `address`."""
    return Operation(
        name=message.name,
        stage=message.stage,
        done_documents=message.done_documents,
        total_documents=message.total_documents,
        create_time_s=message.create_time.ToMilliseconds() / 1000,
        done=message.done,
        error=_error(message.error, address) if message.HasField("error") else None,
        index=messages.index_info(message.response) if message.HasField("response") else None,
    )


async def wait_for(
    operation: Operation, get: Callable[[str, float], Awaitable[Operation]], timeout_s: float
) -> IndexInfo:
    """Waits for an operation's end; `get` asks for it by name, within so many seconds.

    Raises RagClientError as the operation does, and DEADLINE_EXCEEDED's: an operation that is not waited for
    any longer goes on.
    """
    ends_at_s = time.monotonic() + timeout_s
    while not operation.done:
        await asyncio.sleep(_POLL_S)
        operation = await get(operation.name, max(0.0, ends_at_s - time.monotonic()))
    return operation.outcome()


def _error(error: retriever_service_pb2.OperationError, address: str) -> RagClientError:
    codes = {code.value[0]: code for code in grpc.StatusCode}
    return error_of(codes.get(error.code, grpc.StatusCode.UNKNOWN), error.message, address, error.reason)
