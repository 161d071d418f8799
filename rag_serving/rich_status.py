"""Errors on the wire: a RagError as google.rpc.Status with its details, and the way back for a client."""

from collections.abc import Mapping
from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from rag_serving import errors

DOMAIN = "ragpair"
DETAILS_KEY = "grpc-status-details-bin"
# A client takes 8 KiB of metadata by default. The message travels twice, percent-encoded (up to 3 bytes for
# one) and inside the details, which travel as base64 (4 bytes for 3): 3 * 700 + 4/3 * (700 + 3000) < 8192.
_MAX_MESSAGE_BYTES = 700
_MAX_DESCRIPTION_BYTES = 300
_MAX_METADATA_BYTES = 1500
_MAX_DETAILS_BYTES = 3000

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
    """Returns the status with ErrorInfo, and BadRequest or RetryInfo where the error has them.

    Long texts are cut, and violations and facts beyond the first few left out, so that a client can receive it.
    """
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_facts(error.metadata))
    details: list[Message] = [info]
    if isinstance(error, errors.InvalidArgumentError):
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad_request.field_violations.add(
                field=_cut(violation.field, _MAX_DESCRIPTION_BYTES),
                description=_cut(violation.description, _MAX_DESCRIPTION_BYTES),
            )
            if bad_request.ByteSize() + info.ByteSize() > _MAX_DETAILS_BYTES - 2 * _MAX_DESCRIPTION_BYTES:
                break
        details.append(bad_request)
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.status),
        message=_cut(error.message, _MAX_MESSAGE_BYTES),
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


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    facts: dict[str, str] = {}
    size_bytes = 0
    for name, value in metadata.items():
        fact = _cut(value, _MAX_DESCRIPTION_BYTES)
        size_bytes += len(name.encode()) + len(fact.encode())
        if size_bytes > _MAX_METADATA_BYTES:
            break
        facts[name] = fact
    return facts


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


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    return encoded[: max_bytes - 3].decode("utf-8", errors="ignore") + "…"
