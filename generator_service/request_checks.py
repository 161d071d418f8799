"""Refuses what a caller can send wrong, naming the field and the value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_service.types import GenerationSettings, Strategy
from rag_serving.errors import InvalidArgumentError

_CONFIG = "generation_config"
_MAX_PRIORITY = 10


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for. Positions are None where the model has no limit."""

    max_batch_size: int
    max_n_docs: int
    max_num_beams: int
    max_answer_length: int
    max_question_chars: int
    vocab_size: int
    max_positions: int | None
    question_vocab_size: int
    question_max_length: int

    def check_batch(self, count: int, field: str) -> None:
        """A batch has at least one question and at most max_batch_size."""
        if count == 0:
            raise InvalidArgumentError(field, "must hold at least one question", 0)
        if count > self.max_batch_size:
            raise InvalidArgumentError(field, f"at most {self.max_batch_size} questions a request", count)

    def check_texts(self, texts: Sequence[str], field: str) -> None:
        """Questions are neither empty nor endless."""
        self.check_batch(len(texts), field)
        for index, text in enumerate(texts):
            if not text.strip():
                raise InvalidArgumentError(f"{field}[{index}]", "must not be empty", text)
            if len(text) > self.max_question_chars:
                raise InvalidArgumentError(
                    f"{field}[{index}]", f"at most {self.max_question_chars} characters", len(text)
                )

    def check_n_docs(self, n_docs: int, field: str) -> None:
        """1 to max_n_docs."""
        if not 1 <= n_docs <= self.max_n_docs:
            raise InvalidArgumentError(field, f"must be 1 to {self.max_n_docs}", n_docs)

    def check_question_ids(self, input_ids: npt.NDArray[np.int64], field: str) -> None:
        """Token ids of the question tokenizer, no longer than its encoder takes."""
        self.check_batch(input_ids.shape[0], field)
        if not 1 <= input_ids.shape[1] <= self.question_max_length:
            raise InvalidArgumentError(
                field, f"questions have 1 to {self.question_max_length} tokens", input_ids.shape[1]
            )
        check_vocabulary(input_ids, self.question_vocab_size, field)

    def check_question_lengths(self, questions: Sequence[Sequence[int]], field: str) -> None:
        """Tokenised questions fit the question encoder."""
        for index, question in enumerate(questions):
            if len(question) > self.question_max_length:
                raise InvalidArgumentError(
                    f"{field}[{index}]",
                    f"at most {self.question_max_length} tokens fit the question encoder",
                    len(question),
                )

    def check_contexts(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], doc_scores: npt.NDArray[np.float32]
    ) -> None:
        """Shapes agree, masks are runs of ones on the left, scores are numbers, token ids exist."""
        batch, n_docs = doc_scores.shape
        self.check_batch(batch, "contexts.doc_scores")
        self.check_n_docs(n_docs, "contexts.doc_scores")
        if ids.shape[0] != batch * n_docs or ids.shape[1] == 0:
            raise InvalidArgumentError(
                "contexts.context_input_ids",
                f"must be [{batch * n_docs}, length] for doc_scores",
                list(ids.shape),
            )
        if mask.shape != ids.shape:
            raise InvalidArgumentError(
                "contexts.context_attention_mask", f"must have the shape {list(ids.shape)}", list(mask.shape)
            )
        absent = np.isneginf(doc_scores).reshape(-1)  # a retriever pads such columns with empty contexts
        lengths = check_mask(mask, "contexts.context_attention_mask", may_be_empty=absent)
        if self.max_positions is not None and int(lengths.max()) > self.max_positions:
            raise InvalidArgumentError(
                "contexts.context_input_ids", f"at most {self.max_positions} tokens", int(lengths.max())
            )
        check_vocabulary(ids, self.vocab_size, "contexts.context_input_ids")
        if np.isnan(doc_scores).any() or np.isposinf(doc_scores).any():
            raise InvalidArgumentError(
                "contexts.doc_scores", "must be finite, or -inf for a document not there"
            )
        if np.isneginf(doc_scores).all(axis=1).any():
            raise InvalidArgumentError("contexts.doc_scores", "every question needs a document that is there")

    def check_labels(self, labels: npt.NDArray[np.int64], batch: int, field: str) -> None:
        """One target a question, within the vocabulary and the answer length."""
        if labels.shape[0] != batch:
            raise InvalidArgumentError(
                field, f"needs one target for each of {batch} questions", labels.shape[0]
            )
        if not 1 <= labels.shape[1] <= self.max_target_length:
            raise InvalidArgumentError(
                field, f"targets have 1 to {self.max_target_length} tokens", labels.shape[1]
            )
        check_vocabulary(labels, self.vocab_size, field)

    @property
    def max_target_length(self) -> int:
        """Tokens of an answer at most, by the service's limit and the model's."""
        return min(self.max_answer_length, self.max_positions or self.max_answer_length)


def check_mask(
    mask: npt.NDArray[np.int64], field: str, may_be_empty: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Each row is ones, at least one unless it may be empty, then zeros; returns the rows' lengths."""
    lengths: npt.NDArray[np.int64] = mask.sum(axis=1)
    runs = (np.arange(mask.shape[1])[None, :] < lengths[:, None]).astype(mask.dtype)
    empty = (lengths == 0) if may_be_empty is None else (lengths == 0) & ~may_be_empty
    wrong = (runs != mask).any(axis=1) | empty
    if wrong.any():
        row = int(np.nonzero(wrong)[0][0])
        raise InvalidArgumentError(
            f"{field}[{row}]", "must be ones, at least one, and then zeros", mask[row].tolist()
        )
    return lengths


def check_vocabulary(ids: npt.NDArray[np.int64], vocab_size: int, field: str) -> None:
    """Token ids exist."""
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        raise InvalidArgumentError(field, f"token ids are 0 to {vocab_size - 1}", int(ids[wrong][0]))


def check_priority(priority: int) -> None:
    """-10, which goes first, to 10."""
    if abs(priority) > _MAX_PRIORITY:
        raise InvalidArgumentError("priority", f"must be -{_MAX_PRIORITY} to {_MAX_PRIORITY}", priority)


def check_abstain_below(confidence: float) -> None:
    """A probability."""
    if not 0 <= confidence <= 1:
        raise InvalidArgumentError("abstain_below", "must be 0 to 1", confidence)


def _number(test: Callable[[float], bool], what: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not math.isfinite(value) or not test(value):
            raise InvalidArgumentError(f"{_CONFIG}.{name}", what, value)

    return check


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_length": _number(lambda v: v >= 2, "must be at least 2: the start token and one more"),
    "max_new_tokens": _number(lambda v: v >= 1, "must be at least 1"),
    "min_length": _number(lambda v: v >= 0, "must not be negative"),
    "min_new_tokens": _number(lambda v: v >= 0, "must not be negative"),
    "num_beams": _number(lambda v: v >= 1, "must be at least 1"),
    "num_return_sequences": _number(lambda v: v >= 1, "must be at least 1"),
    "temperature": _number(lambda v: v > 0, "must be above 0"),
    "top_k": _number(lambda v: v >= 0, "must not be negative"),
    "top_p": _number(lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "min_p": _number(lambda v: 0 <= v <= 1, "must be 0 to 1"),
    "typical_p": _number(lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "epsilon_cutoff": _number(lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "eta_cutoff": _number(lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "repetition_penalty": _number(lambda v: v > 0, "must be above 0"),
    "encoder_repetition_penalty": _number(lambda v: v > 0, "must be above 0"),
    "no_repeat_ngram_size": _number(lambda v: v >= 0, "must not be negative"),
    "encoder_no_repeat_ngram_size": _number(lambda v: v >= 0, "must not be negative"),
    "length_penalty": _number(lambda v: abs(v) <= 100, "must be -100 to 100"),
}


def check_given(given: dict[str, Any], vocab_size: int) -> None:
    """Arguments as the request sets them, each on its own."""
    for name, value in given.items():
        if name in _CHECKS:
            _CHECKS[name](name, value)
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        _check_tokens(name, [given[name]] if name in given else [], vocab_size)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        _check_tokens(name, [given[name]] if given.get(name, -1) != -1 else [], vocab_size)
    for name in ("eos_token_ids", "suppress_tokens", "begin_suppress_tokens"):
        _check_tokens(name, given.get(name, ()), vocab_size)
    for name in ("bad_words_ids", "allowed_sequences"):
        for index, sequence in enumerate(given.get(name, ())):
            if not sequence:
                raise InvalidArgumentError(f"{_CONFIG}.{name}[{index}].token_ids", "must not be empty", [])
            _check_tokens(f"{name}[{index}].token_ids", sequence, vocab_size)


def check_settings(
    settings: GenerationSettings, strategy: Strategy, n_docs: int, limits: RequestLimits
) -> None:
    """Arguments against one another and the service's limits, once resolved."""
    longest = limits.max_target_length
    if settings.max_length > longest:
        raise InvalidArgumentError(
            f"{_CONFIG}.max_length", f"at most {longest}, start token counted", settings.max_length
        )
    if max(settings.min_length, settings.min_new_tokens + 1) > settings.max_length:
        raise InvalidArgumentError(
            f"{_CONFIG}.min_length",
            f"must not be above max_length {settings.max_length}",
            settings.min_length,
        )
    if settings.num_beams > limits.max_num_beams:
        raise InvalidArgumentError(
            f"{_CONFIG}.num_beams", f"at most {limits.max_num_beams}", settings.num_beams
        )
    most = _most_sequences(settings, strategy, n_docs, limits)
    if settings.num_return_sequences > most:
        raise InvalidArgumentError(
            f"{_CONFIG}.num_return_sequences",
            f"at most {most} for num_beams {settings.num_beams}",
            settings.num_return_sequences,
        )


def _most_sequences(
    settings: GenerationSettings, strategy: Strategy, n_docs: int, limits: RequestLimits
) -> int:
    if strategy is Strategy.RAG_SEQUENCE:
        return settings.num_beams * n_docs
    if settings.do_sample and not settings.is_beam_search:
        return limits.max_num_beams
    return settings.num_beams


def _check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidArgumentError(f"{_CONFIG}.{name}", f"token ids are 0 to {vocab_size - 1}", token)
