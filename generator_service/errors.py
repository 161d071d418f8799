"""The generator's own errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_serving.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RagError,
    ResourceExhaustedError,
    StartupError,
    UnavailableError,
)

if TYPE_CHECKING:
    from generator_service.engine.messages import Failed


class CheckpointError(StartupError):
    """The checkpoint is missing, damaged or not one that can be served."""

    reason = "CHECKPOINT_UNUSABLE"


class WorkerLostError(UnavailableError):
    """The device's process died or is starting again."""

    reason = "WORKER_LOST"

    def __init__(self, device: str) -> None:
        super().__init__(f"the worker on {device} is not there; it is being started again", 2.0)


class EngineFailureError(UnavailableError):
    """The device failed in the middle of a question."""

    reason = "ENGINE_FAILURE"


class QueueFullError(ResourceExhaustedError):
    """More questions wait than the service takes."""

    reason = "QUEUE_FULL"


class DeviceTooSmallError(ResourceExhaustedError):
    """The device has no memory for the question, even alone."""

    reason = "DEVICE_TOO_SMALL"


class RetrieverUnavailableError(UnavailableError):
    """The retriever cannot be reached, or says that it is not ready."""

    reason = "RETRIEVER_UNAVAILABLE"


class MismatchError(FailedPreconditionError):
    """The retriever's index was not built for this question encoder or generator."""

    reason = "RETRIEVER_MISMATCH"


class NoDocumentsError(FailedPreconditionError):
    """The retriever found no document to answer from."""

    reason = "NO_DOCUMENTS"


class NoAnswerError(FailedPreconditionError):
    """There is no answer to explain: the processors left none."""

    reason = "NO_ANSWER"

    def __init__(self, question: int) -> None:
        super().__init__(f"question {question} has no answer under its generation_config: nothing to explain")


class PinnedElsewhereError(FailedPreconditionError):
    """The request is pinned to a checkpoint, an index generation or contexts that are not those here."""

    reason = "PINNED_ELSEWHERE"

    def __init__(self, field: str, expected: object, here: object) -> None:
        super().__init__(f"{field}: the request is pinned to {expected!r}, and here it is {here!r}")


class PastLostError(NotFoundError):
    """A handle of past_key_values that is no longer held, or never was."""

    reason = "PAST_KEY_VALUES_LOST"


_TOO_LARGE = {"generation_config", "input"}


def error_of(report: Failed) -> RagError:
    """What a worker's refusal is for the caller."""
    match report.status:
        case "INVALID_ARGUMENT":
            return InvalidArgumentError(
                report.field,
                report.message,
                reason="TOO_LARGE_FOR_DEVICE" if report.field in _TOO_LARGE else None,
            )
        case "NOT_FOUND":
            return PastLostError(report.message)
        case "RESOURCE_EXHAUSTED":
            return DeviceTooSmallError(report.message, 1.0)
        case "DEADLINE_EXCEEDED":
            return DeadlineExceededError(report.message)
        case _:
            return EngineFailureError(report.message, 1.0)
