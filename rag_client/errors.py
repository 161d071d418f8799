"""What a failed call raises, with everything that the service said about it.

RagClientError              code, reason, message, field_violations, retry_after_s, metadata
├── InvalidRequestError     INVALID_ARGUMENT, OUT_OF_RANGE   field_violations name what is wrong
├── NotFoundError           NOT_FOUND, UNIMPLEMENTED
├── RefusedError            FAILED_PRECONDITION              the two sides do not fit
├── AccessError             UNAUTHENTICATED, PERMISSION_DENIED
├── BusyError               RESOURCE_EXHAUSTED               come again after retry_after_s
├── UnavailableError        UNAVAILABLE                      come again after retry_after_s
│   └── UnreachableError                                     nobody answered at the address
├── TimedOutError           DEADLINE_EXCEEDED
└── ServiceError            INTERNAL, DATA_LOSS, UNKNOWN …   a fault of the service
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request, by its path, and what is wrong with it."""

    field: str
    description: str


class RagClientError(Exception):
    """A call failed.

    `code` is the gRPC status; `reason` an UPPER_SNAKE word that programs can match, empty where the service
    gave none; `retry_after_s` the wait that gives a retry a chance, None where none was named.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        address: str,
        reason: str = "",
        field_violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.address = address
        self.reason = reason
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidRequestError(RagClientError):
    """The request is wrong; `field_violations` names the fields."""


class NotFoundError(RagClientError):
    """The thing asked for, or the method, does not exist there."""


class RefusedError(RagClientError):
    """The state of the service forbids the request: the two sides do not fit, for example."""


class AccessError(RagClientError):
    """The service does not know the caller, or does not let it do this."""


class BusyError(RagClientError):
    """The service has too much to do."""


class UnavailableError(RagClientError):
    """A part that the request needs is down."""


class UnreachableError(UnavailableError):
    """Nobody answered at the address."""


class TimedOutError(RagClientError):
    """The time of the call ran out."""


class ServiceError(RagClientError):
    """A fault of the service."""


_BY_CODE: dict[grpc.StatusCode, type[RagClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNIMPLEMENTED: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.ABORTED: RefusedError,
    grpc.StatusCode.ALREADY_EXISTS: RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BusyError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
}


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> RagClientError:
    """Returns the error that a failed call to `address` stands for."""
    code = error.code()
    status = _rich_status(error)
    info = _detail(status, error_details_pb2.ErrorInfo)
    bad_request = _detail(status, error_details_pb2.BadRequest)
    retry = _detail(status, error_details_pb2.RetryInfo)
    kind = _BY_CODE.get(code, ServiceError)
    if kind is UnavailableError and status is None:
        kind = UnreachableError
    return kind(
        error.details() or code.name,
        code=code,
        address=address,
        reason=info.reason if info is not None else "",
        field_violations=[
            FieldViolation(one.field, one.description)
            for one in (bad_request.field_violations if bad_request is not None else ())
        ],
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None,
        metadata=dict(info.metadata) if info is not None else None,
    )


def error_of(code: grpc.StatusCode, message: str, address: str, reason: str) -> RagClientError:
    """Returns the error of an operation that failed at `address`."""
    return _BY_CODE.get(code, ServiceError)(message, code=code, address=address, reason=reason)


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(error)  # type: ignore[arg-type]  # has the four methods that are used
    except ValueError:
        return None


def _detail(status: status_pb2.Status | None, kind: type[MessageT]) -> MessageT | None:
    for packed in status.details if status is not None else ():
        message = kind()
        if packed.Unpack(message):
            return message
    return None
