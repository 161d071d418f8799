"""Every error that a service may show its caller: gRPC status, reason, and whether a retry can help.

    RagError
    ├── InvalidArgumentError       INVALID_ARGUMENT     the request itself is wrong; names the fields
    ├── NotFoundError              NOT_FOUND            the thing asked for does not exist
    ├── FailedPreconditionError    FAILED_PRECONDITION  the two sides do not fit, or the state forbids it
    ├── AbortedError               ABORTED              someone else was faster; read again, then decide
    ├── ResourceExhaustedError     RESOURCE_EXHAUSTED   too much work at once; says when to come again
    ├── UnavailableError           UNAVAILABLE          a part is down for now; says when to come again
    ├── DeadlineExceededError      DEADLINE_EXCEEDED    the caller's time ran out
    ├── CancelledByCallerError     CANCELLED            the caller went away
    ├── DataLossError              DATA_LOSS            stored data is damaged
    ├── InternalError              INTERNAL             a fault of the service
    └── StartupError               (exit status 1)      the service cannot start; never sent on the wire

A service's own errors subclass these and set `reason`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

_SHOWN_VALUE_CHARS = 80


class RagError(Exception):
    """Base of all errors that have a meaning for the caller.

    `status` is the name of a gRPC status code; `reason` is an UPPER_SNAKE word that programs can match;
    `retryable` says whether the same request may succeed later; `metadata` adds facts for programs.
    """

    status: ClassVar[str] = "INTERNAL"
    reason: str = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        if reason is not None:
            self.reason = reason


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request: its path and what is wrong with it."""

    field: str
    description: str


class InvalidArgumentError(RagError):
    """The request is wrong, whatever the state of the service; `violations` names every wrong field."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(
        self, field: str, message: str, value: object | None = None, *, reason: str | None = None
    ) -> None:
        description = message if value is None else f"{message}, got {_shown(value)}"
        super().__init__(f"{field}: {description}", reason=reason)
        self.violations: tuple[FieldViolation, ...] = (FieldViolation(field, description),)

    @classmethod
    def of(cls, violations: Sequence[FieldViolation]) -> "InvalidArgumentError":
        """Makes one error of several wrong fields. Raises ValueError where there is none."""
        if not violations:
            raise ValueError("an InvalidArgumentError needs at least one violation")
        error = cls(violations[0].field, violations[0].description)
        error.violations = tuple(violations)
        error.message = "; ".join(f"{one.field}: {one.description}" for one in violations)
        error.args = (error.message,)
        return error


class NotFoundError(RagError):
    """The thing asked for does not exist."""

    status = "NOT_FOUND"
    reason = "NOT_FOUND"


class FailedPreconditionError(RagError):
    """The request is well formed, but the state of the service or of its peer forbids it."""

    status = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class AbortedError(RagError):
    """What the request was based on has changed meanwhile: read it again before asking again."""

    status = "ABORTED"
    reason = "ABORTED"


class _RetryLaterError(RagError):
    """An error that passes: `retry_after_s` is the wait, in seconds, that gives a retry a chance."""

    retryable = True

    def __init__(
        self,
        message: str,
        retry_after_s: float = 1.0,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s


class ResourceExhaustedError(_RetryLaterError):
    """More work than the service takes at once."""

    status = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class UnavailableError(_RetryLaterError):
    """A part that the request needs is down, starting or going down."""

    status = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DeadlineExceededError(RagError):
    """The caller's time ran out before the answer was there."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class CancelledByCallerError(RagError):
    """The caller cancelled or hung up; the work was dropped."""

    status = "CANCELLED"
    reason = "CANCELLED_BY_CALLER"


class DataLossError(RagError):
    """Stored data is damaged: a checksum differs, a row is missing."""

    status = "DATA_LOSS"
    reason = "DATA_LOSS"


class InternalError(RagError):
    """A fault of the service that it knows of; unknown ones become INTERNAL by the error interceptor."""


class StartupError(RagError):
    """The service cannot start. The process prints the message and exits with `exit_status`."""

    status = "FAILED_PRECONDITION"
    reason = "STARTUP_FAILED"
    exit_status: ClassVar[int] = 1


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE_CHARS else f"{text[:_SHOWN_VALUE_CHARS]}…"
