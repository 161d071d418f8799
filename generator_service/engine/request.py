"""A request inside the engine, and the states it goes through."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from generator_service.engine.messages import EncodeQuestion, GenerateAnswer, ScoreTarget, Work
from generator_service.engine.pass_messages import ForwardPass, QuestionPass
from generator_service.types import Compatibility, SequenceDecoding, Strategy


class RequestState(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED_ANSWERED = auto()
    FINISHED_ABORTED = auto()
    FINISHED_EXPIRED = auto()
    FINISHED_FAILED = auto()


@dataclass(eq=False)
class Request:
    """One question or target, from its arrival to its answer. Times are time.monotonic's seconds."""

    work: Work
    arrived_s: float = field(default_factory=time.monotonic)
    admitted_s: float | None = None
    state: RequestState = RequestState.WAITING
    reserved_bytes: int = 0
    first_token_s: float | None = None
    num_streamed: int = 0  # tokens of its answer that the caller has, should it begin anew
    pass_bytes: int = 0  # of a forward pass, as its runner knows them
    times_passed: int = 0  # requests behind it in the queue that were admitted because it did not fit

    @property
    def request_id(self) -> int:
        """The service's number for it."""
        return self.work.request_id

    @property
    def deadline_s(self) -> float | None:
        """When the caller stops waiting."""
        return None if isinstance(self.work, EncodeQuestion) else self.work.deadline_s

    def expired(self, now_s: float) -> bool:
        """Whether nobody waits any more."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    @property
    def streams(self) -> bool:
        """Whether its tokens are wanted as they become certain; RAG-Sequence's do when its candidates are scored."""
        work = self.work
        return isinstance(work, GenerateAnswer) and work.stream and work.strategy is Strategy.RAG_TOKEN

    @property
    def max_rows(self) -> int:
        """Decoder rows of its widest step."""
        match self.work:
            case GenerateAnswer():
                return len(self.work.contexts) * max(self.work.settings.num_beams, self.num_chains)
            case ScoreTarget():
                return len(self.work.contexts) * len(self.work.labels)
            case EncodeQuestion() | QuestionPass() | ForwardPass():
                return 0

    @property
    def num_chains(self) -> int:
        """Independent hypotheses of greedy search and sampling."""
        work = self.work
        if (
            isinstance(work, GenerateAnswer)
            and work.strategy is Strategy.RAG_TOKEN
            and work.settings.do_sample
        ):
            return work.settings.num_return_sequences
        return 1

    @property
    def context_lengths(self) -> list[int]:
        """Tokens of every context that is encoded for it."""
        if isinstance(self.work, EncodeQuestion | QuestionPass | ForwardPass):
            return []
        lengths = [len(c) for c in self.work.contexts]
        if self.attends_pads:
            assert isinstance(self.work, GenerateAnswer)
            assert self.work.padded_contexts is not None
            lengths += [len(c) for c in self.work.padded_contexts]
        return lengths

    @property
    def attends_pads(self) -> bool:
        """Whether candidates are generated over padded contexts (docs/parity.md, quirk 1)."""
        work = self.work
        return (
            isinstance(work, GenerateAnswer)
            and work.strategy is Strategy.RAG_SEQUENCE
            and work.compatibility is Compatibility.HF
            and work.padded_contexts is not None
            and any(len(p) > len(c) for p, c in zip(work.padded_contexts, work.contexts, strict=True))
        )

    @property
    def search_scores(self) -> bool:
        """Whether a candidate's log-probabilities in its own search are its scores under that document."""
        work = self.work
        return (
            isinstance(work, GenerateAnswer)
            and work.strategy is Strategy.RAG_SEQUENCE
            and work.sequence_decoding is SequenceDecoding.THOROUGH
            and not self.attends_pads
        )

    @property
    def max_caches(self) -> int:
        """Self-attention caches, one a context, that it ever takes: of its searches, of scoring, of tracing."""
        match self.work:
            case GenerateAnswer():
                scoring = self.work.strategy is Strategy.RAG_SEQUENCE
                return (1 + scoring + self.work.trace) * len(self.work.contexts)
            case ScoreTarget():
                return len(self.work.contexts)
            case EncodeQuestion() | QuestionPass() | ForwardPass():
                return 0

    @property
    def max_slots(self) -> int:
        """Self-attention slots of all its searches at their longest, and of scoring its candidates."""
        match self.work:
            case GenerateAnswer():
                width = max(self.work.settings.num_beams, self.num_chains)
                search = 1 + max(0, self.work.settings.max_length - 2) * width
                scoring = 0
                if self.work.strategy is Strategy.RAG_SEQUENCE:
                    scoring = width * len(self.work.contexts) * self.work.settings.max_length
                return (search + scoring) * len(self.work.contexts)
            case ScoreTarget():
                return len(self.work.labels) * len(self.work.contexts)
            case EncodeQuestion() | QuestionPass() | ForwardPass():
                return 0
