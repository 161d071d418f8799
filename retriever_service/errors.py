"""The retriever's own errors; statuses and the meaning of each base stand in rag_serving.errors.

InvalidArgumentError
└── InvalidSearchParametersError   INVALID_SEARCH_PARAMETERS  a knob that this kind of index does not have
FailedPreconditionError
├── ExpectationError               EXPECTATION_MISMATCH       the caller was built for another index
└── NoQuestionTokenizerError       NO_QUESTION_TOKENIZER      question_input_ids cannot be decoded here
ResourceExhaustedError
└── OverloadedError                RETRIEVER_OVERLOADED       too many questions wait
DataLossError
└── DamagedIndexError              INDEX_DAMAGED              a file of the index is not what was written
StartupError
├── MissingIndexError              INDEX_MISSING              no index in the folder
├── TokenizerError                 TOKENIZER_UNUSABLE         no tokenizer there, or not a fast one
└── BuildError                     BUILD_FAILED               `rag-index build` cannot go on; says where
"""

from rag_serving.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StartupError,
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


class OverloadedError(ResourceExhaustedError):
    """More questions wait than the service queues."""

    reason = "RETRIEVER_OVERLOADED"


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
