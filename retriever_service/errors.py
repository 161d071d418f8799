"""The retriever's own errors; statuses and the meaning of each base stand in rag_serving.errors.

InvalidArgumentError
├── InvalidSearchParametersError   INVALID_SEARCH_PARAMETERS  a knob that this kind of index does not have
└── RequestIdReusedError           REQUEST_ID_REUSED          another change has that request_id
FailedPreconditionError
├── ExpectationError               EXPECTATION_MISMATCH       the caller was built for another index
├── NoQuestionTokenizerError       NO_QUESTION_TOKENIZER      question_input_ids cannot be decoded here
├── NoPassageEncoderError          NO_PASSAGE_ENCODER         documents without embeddings, and no model for them
├── GenerationGoneError            GENERATION_GONE            the pinned generation serves no more
├── ReadOnlyError                  INDEX_READ_ONLY            another service writes to the folder, or nobody may
├── OperationRunningError          OPERATION_RUNNING          one compaction or activation at a time
└── CompactionError                COMPACTION_IMPOSSIBLE      these documents cannot become an index of this kind
AbortedError
├── EtagError                      ETAG_MISMATCH              the document is not the version that was named
└── KeyExistsError                 KEY_EXISTS                 create_only, and the key is taken
NotFoundError
└── OperationNotFoundError         OPERATION_NOT_FOUND        no such operation in this process
ResourceExhaustedError
├── OverloadedError                RETRIEVER_OVERLOADED       too many questions wait
└── DiskFullError                  DISK_FULL                  no room for the change; reading goes on
UnavailableError
└── UnreadableChangesError         CHANGES_UNREADABLE         changes of another process, which cannot be read here now
DataLossError
└── DamagedIndexError              INDEX_DAMAGED              a file of the index is not what was written
StartupError
├── MissingIndexError              INDEX_MISSING              no index in the folder
├── TokenizerError                 TOKENIZER_UNUSABLE         no tokenizer there, or not a fast one
└── BuildError                     BUILD_FAILED               `rag-index build` cannot go on; says where
"""

import errno
from collections.abc import Sequence

from rag_serving.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StartupError,
    UnavailableError,
)


class InvalidSearchParametersError(InvalidArgumentError):
    """A search knob that this kind of index does not have, or a value outside its range."""

    reason = "INVALID_SEARCH_PARAMETERS"


class ExpectationError(FailedPreconditionError):
    """The caller was built for another index; the message names both values."""

    reason = "EXPECTATION_MISMATCH"

    def __init__(self, field: str, expected: object, actual: object) -> None:
        super().__init__(
            f"expectation.{field}: the caller expects {expected!r}, this index has {actual!r}",
            metadata={"field": field, "expected": str(expected), "actual": str(actual)},
        )


class NoQuestionTokenizerError(FailedPreconditionError):
    """The request gives question_input_ids, and this retriever was started without a question tokenizer."""

    reason = "NO_QUESTION_TOKENIZER"


class RequestIdReusedError(InvalidArgumentError):
    """A change under a request_id that names another change already."""

    def __init__(self, request_id: str) -> None:
        super().__init__("request_id", "names another change already", request_id, reason="REQUEST_ID_REUSED")


class NoPassageEncoderError(FailedPreconditionError):
    """Documents came without embeddings, and the service was started without --embedding-model."""

    reason = "NO_PASSAGE_ENCODER"


class GenerationGoneError(FailedPreconditionError):
    """The request pins a generation that does not serve: dropped, or never there."""

    reason = "GENERATION_GONE"

    def __init__(self, generation: int, serving: Sequence[int]) -> None:
        super().__init__(
            f"generation {generation} does not serve; {', '.join(map(str, serving))} can be pinned",
            metadata={"generation": str(generation), "serving": ",".join(map(str, serving))},
        )


class ReadOnlyError(FailedPreconditionError):
    """This service takes no changes; the message says why."""

    reason = "INDEX_READ_ONLY"


class OperationRunningError(FailedPreconditionError):
    """Another compaction or activation runs; the message names it."""

    reason = "OPERATION_RUNNING"


class CompactionError(FailedPreconditionError):
    """The documents cannot become a snapshot; the message says why. What serves, serves on."""

    reason = "COMPACTION_IMPOSSIBLE"


class EtagError(AbortedError):
    """A document is not the version that the change was meant for."""

    reason = "ETAG_MISMATCH"

    def __init__(self, key: str, given: str, stored: str | None) -> None:
        is_there = "there is no such document" if stored is None else f"the stored one is {stored!r}"
        super().__init__(
            f"document {key!r}: etag {given!r} was given, {is_there}",
            metadata={"key": key, "etag": stored or ""},
        )


class KeyExistsError(AbortedError):
    """A document to create is there already."""

    reason = "KEY_EXISTS"

    def __init__(self, key: str) -> None:
        super().__init__(f"document {key!r} is already there", metadata={"key": key})


class OperationNotFoundError(NotFoundError):
    """No operation of that name in this process; operations end with the process."""

    reason = "OPERATION_NOT_FOUND"


class DiskFullError(ResourceExhaustedError):
    """The disk has no room for the change; nothing of it was written, and reading goes on."""

    reason = "DISK_FULL"


def is_full(error: OSError) -> bool:
    """Whether the system refuses for want of room."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


class OverloadedError(ResourceExhaustedError):
    """More questions wait than the service queues."""

    reason = "RETRIEVER_OVERLOADED"


class UnreadableChangesError(UnavailableError):
    """What another process writes cannot be read from here, now or at all; the message says why."""

    reason = "CHANGES_UNREADABLE"

    def __init__(self, file: object, what: str) -> None:
        super().__init__(f"{file}: {what}", metadata={"file": str(file)})


class DamagedIndexError(DataLossError):
    """A file of the index is missing or is not what the build wrote; the message names the file."""

    reason = "INDEX_DAMAGED"

    def __init__(self, file: object, what: str) -> None:
        super().__init__(f"{file}: {what}", metadata={"file": str(file)})


class MissingIndexError(StartupError):
    """The folder holds no index; the message says how one is built."""

    reason = "INDEX_MISSING"


class TokenizerError(StartupError):
    """A tokenizer cannot be loaded, or is not one that assembly can use."""

    reason = "TOKENIZER_UNUSABLE"


class BuildError(StartupError):
    """`rag-index` cannot go on with what it was given; the message says where the fault is."""

    reason = "BUILD_FAILED"
