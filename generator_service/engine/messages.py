"""What the service and its worker processes say to each other: msgpack frames of these structs."""

from __future__ import annotations

import msgspec

from generator_service.engine.pass_messages import ForwardPass, PassDone, QuestionPass, ReleasePast
from generator_service.types import (
    Compatibility,
    GenerationSettings,
    Hypothesis,
    QuestionScore,
    SequenceDecoding,
    Strategy,
)


class EncodeQuestion(msgspec.Struct, frozen=True, kw_only=True, tag="encode"):
    """One question for the question encoder; attention_mask has input_ids' length."""

    request_id: int
    input_ids: list[int]
    attention_mask: list[int]


class GenerateAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One question to answer over its contexts.

    contexts hold no pads; padded_contexts are the same with theirs, for Compatibility.HF, which attends to them
    while RAG-Sequence generates. doc_scores are finite, one a context. Lower priorities go first (queue.py);
    stream asks for Progress on the way to a RAG-Token answer. deadline_s is on time.monotonic's clock.
    """

    request_id: int
    strategy: Strategy
    sequence_decoding: SequenceDecoding
    compatibility: Compatibility
    settings: GenerationSettings
    contexts: list[list[int]]
    padded_contexts: list[list[int]] | None
    doc_scores: list[float]
    do_deduplication: bool
    exclude_bos_score: bool
    trace: bool = False
    stream: bool = False
    priority: int = 0
    deadline_s: float | None = None


class ScoreTarget(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """One target to score over its contexts; exclude_first leaves the first target token out (its BOS)."""

    request_id: int
    strategy: Strategy
    compatibility: Compatibility
    contexts: list[list[int]]
    doc_scores: list[float]
    labels: list[int]
    pad_token_id: int
    exclude_first: bool
    trace: bool = False
    priority: int = 0
    deadline_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The caller no longer waits for this request."""

    request_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing more and exit."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The worker has loaded and warmed up its model."""

    decoder: str
    vocab_size: int
    max_positions: int | None
    cache_budget_bytes: int
    num_parameters: int
    dtype: str
    retrieval_vector_size: int
    question_vocab_size: int
    question_max_length: int


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The worker cannot load its model: the reason, for people."""

    message: str


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """question_hidden_states of one question: little-endian float32 [dim]."""

    request_id: int
    hidden_states: bytes


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Further tokens of the answer that will be the best, certain from now on; document_posterior [tokens, contexts].

    The last one ends the answer; Generated follows it.
    """

    request_id: int
    token_ids: list[int]
    document_posterior: list[list[float]]
    last: bool


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag="generated"):
    """Hypotheses of one question, best first; document_posterior is over the contexts sent.

    Seconds: queue_s to admission, first_token_s to the end of the first step, generate_s from admission to the answer.
    """

    request_id: int
    hypotheses: list[Hypothesis]
    queue_s: float
    first_token_s: float
    generate_s: float


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored"):
    """Score of one target."""

    request_id: int
    score: QuestionScore


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A request that got no answer: status and reason as in rag_serving.errors; field is what was wrong, if any."""

    request_id: int
    status: str
    message: str
    field: str = "generation_config"


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Heartbeat: what the engine holds and has done since it began."""

    waiting: int
    running: int
    rows: int
    cache_bytes: int
    cache_budget_bytes: int
    steps: int
    step_s: dict[str, float]
    tokens: int
    at_s: float = 0.0  # time.monotonic's, when it was said


Work = EncodeQuestion | GenerateAnswer | ScoreTarget | QuestionPass | ForwardPass
Command = Work | ReleasePast | Abort | Shutdown
Report = Ready | StartFailed | Encoded | Progress | Generated | Scored | PassDone | Failed | Stats

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """One message as bytes, without its length."""
    return _encoder.encode(message)


def decode_command(frame: bytes) -> Command:
    """Read what the service said."""
    return _commands.decode(frame)


def decode_report(frame: bytes) -> Report:
    """Read what a worker said."""
    return _reports.decode(frame)
