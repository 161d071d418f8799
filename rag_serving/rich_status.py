"""Errors on the wire: a RagError as google.rpc.Status with its details, and the way back for a client."""

from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from rag_serving import errors

DOMAIN = "ragpair"
DETAILS_KEY = "grpc-status-details-bin"
# A client takes 8 KiB of metadata by default; message and details must both fit.
_MAX_MESSAGE_CHARS = 600
_MAX_DESCRIPTION_CHARS = 160
_MAX_VIOLATIONS = 12

_BY_STATUS: dict[str, type[errors.RagError]] = {
    kind.status: kind
    for kind in (
        errors.NotFoundError,
        errors.FailedPreconditionError,
        errors.ResourceExhaustedError,
        errors.UnavailableError,
        errors.DeadlineExceededError,
        errors.CancelledByCallerError,
        errors.DataLossError,
        errors.InternalError,
    )
}
MessageT = TypeVar("MessageT", bound=Message)


def to_status(error: errors.RagError) -> status_pb2.Status:
    """Returns the status with ErrorInfo, and BadRequest or RetryInfo where the error has them."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details: list[Message] = [info]
    if isinstance(error, errors.InvalidArgumentError):
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad_request.field_violations.add(
                field=violation.field, description=_cut(violation.description, _MAX_DESCRIPTION_CHARS)
            )
        details.append(bad_request)
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.status),
        message=_cut(error.message, _MAX_MESSAGE_CHARS),
        details=[_packed(detail) for detail in details],
    )


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.RagError:
    """Returns the RagError that a failed call of ours carries; foreign statuses map to the nearest one."""
    name = error.code().name
    message = error.details() or name
    details = _details(error)
    info = _unpacked(details, error_details_pb2.ErrorInfo)
    reason = info.reason if info is not None and info.reason else None
    if name == "INVALID_ARGUMENT":
        return _invalid_argument(message, details, reason)
    kind = _BY_STATUS.get(name)
    if kind is None:
        return errors.InternalError(f"{name}: {message}", reason=reason or name)
    back = kind(message, reason=reason, metadata=dict(info.metadata) if info is not None else None)
    retry = _unpacked(details, error_details_pb2.RetryInfo)
    if retry is not None and hasattr(back, "retry_after_s"):
        back.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return back


def _invalid_argument(
    message: str, details: list[any_pb2.Any], reason: str | None
) -> errors.InvalidArgumentError:
    bad_request = _unpacked(details, error_details_pb2.BadRequest)
    if bad_request is None or not bad_request.field_violations:
        return errors.InvalidArgumentError("request", message, reason=reason)
    back = errors.InvalidArgumentError.of(
        [errors.FieldViolation(one.field, one.description) for one in bad_request.field_violations]
    )
    if reason is not None:
        back.reason = reason
    return back


def _details(error: grpc.aio.AioRpcError) -> list[any_pb2.Any]:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _unpacked(details: list[any_pb2.Any], kind: type[MessageT]) -> MessageT | None:
    for detail in details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
