"""What transformers answers: the stock classes, and RAG-Sequence with the mask put in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RagSequenceForGeneration,
)
from transformers.utils import logging

from generator_service.types import EarlyStopping, GenerationSettings

logging.set_verbosity_error()

_EARLY_STOPPING: dict[EarlyStopping, bool | str] = {
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.FIRST_COMPLETE: True,
    EarlyStopping.NEVER: "never",
}


@dataclass(frozen=True)
class Question:
    """Contexts without pads, and the scores of their documents."""

    contexts: list[list[int]]
    doc_scores: list[float]


@dataclass(frozen=True)
class Batch:
    """Questions with equal n_docs, as transformers takes them."""

    questions: list[Question]
    pad_token_id: int
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", max(len(c) for q in self.questions for c in q.contexts))

    @property
    def n_docs(self) -> int:
        return len(self.questions[0].contexts)

    @property
    def has_pads(self) -> bool:
        return any(len(c) < self.width for q in self.questions for c in q.contexts)

    def padded(self, context: list[int]) -> list[int]:
        return context + [self.pad_token_id] * (self.width - len(context))

    def tensors(self) -> dict[str, Tensor]:
        """context_input_ids, context_attention_mask, doc_scores."""
        contexts = [c for q in self.questions for c in q.contexts]
        ones = [[1] * len(c) + [0] * (self.width - len(c)) for c in contexts]
        return {
            "context_input_ids": torch.tensor([self.padded(c) for c in contexts]),
            "context_attention_mask": torch.tensor(ones),
            "doc_scores": torch.tensor([q.doc_scores for q in self.questions]),
        }


@dataclass(frozen=True)
class Answer:
    """A hypothesis: tokens up to the first end token, and its score where transformers gives one."""

    token_ids: list[int]
    score: float | None


def generation_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """The same settings as transformers takes them, nothing left to a default."""
    s = settings
    arguments: dict[str, Any] = {
        "max_length": s.max_length,
        "min_length": s.min_length,
        "min_new_tokens": s.min_new_tokens or None,
        "num_beams": s.num_beams,
        "num_return_sequences": s.num_return_sequences,
        "repetition_penalty": s.repetition_penalty,
        "encoder_repetition_penalty": s.encoder_repetition_penalty,
        "no_repeat_ngram_size": s.no_repeat_ngram_size,
        "encoder_no_repeat_ngram_size": s.encoder_no_repeat_ngram_size,
        "bad_words_ids": [list(w) for w in s.bad_words_ids] or None,
        "suppress_tokens": list(s.suppress_tokens) or None,
        "begin_suppress_tokens": list(s.begin_suppress_tokens) or None,
        "forced_bos_token_id": s.forced_bos_token_id,
        "forced_eos_token_id": s.forced_eos_token_id,
        "decoder_start_token_id": s.decoder_start_token_id,
        "bos_token_id": s.bos_token_id,
        "eos_token_id": list(s.eos_token_ids),
        "pad_token_id": s.pad_token_id,
        "renormalize_logits": s.renormalize_logits,
        "do_sample": s.do_sample,
    }
    if s.is_beam_search:
        arguments |= {
            "length_penalty": s.length_penalty,
            "early_stopping": _EARLY_STOPPING[s.early_stopping],
        }
    if s.do_sample:
        names = ("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
        arguments |= {name: getattr(s, name) for name in names}
        arguments["min_p"] = s.min_p or None
    if s.allowed_sequences:
        arguments["prefix_allowed_tokens_fn"] = _only(s)
    return arguments


def _both_minima(settings: GenerationSettings) -> dict[str, Any]:
    """generate lets min_new_tokens replace min_length, which RagToken's own generate does not."""
    return {"min_length": max(settings.min_length, 1 + settings.min_new_tokens), "min_new_tokens": None}


def _only(settings: GenerationSettings) -> Any:
    """prefix_allowed_tokens_fn for a list of allowed answers, the obvious way."""

    def allowed(_: int, input_ids: Tensor) -> list[int]:
        prefix = tuple(input_ids[1:].tolist())
        longer = [s for s in settings.allowed_sequences if len(s) > len(prefix)]
        follow = {s[len(prefix)] for s in longer if s[: len(prefix)] == prefix}
        return sorted(follow) or list(settings.eos_token_ids)

    return allowed


def trimmed(row: Sequence[int], settings: GenerationSettings) -> list[int]:
    """A row without what stands after its first end token."""
    for index, token in enumerate(row):
        if index > 0 and token in settings.eos_token_ids:
            return list(row[: index + 1])
    return list(row)


class NoNgramOfAnyDocument(LogitsProcessor):
    """encoder_no_repeat_ngram_size over all documents of a question, which transformers indexes wrongly."""

    def __init__(self, size: int, questions: Sequence[Question], num_beams: int) -> None:
        self.size, self.num_beams = size, num_beams
        self.ngrams = [
            {tuple(c[i : i + size]) for c in q.contexts for i in range(len(c) - size + 1)} for q in questions
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, prefix in enumerate(input_ids.tolist()):
            last = tuple(prefix[len(prefix) - self.size + 1 :]) if len(prefix) >= self.size - 1 else None
            for ngram in self.ngrams[row // self.num_beams]:
                if ngram[:-1] == last:
                    scores[row, ngram[-1]] = -torch.inf
        return scores


class FavourTokensOfAnyDocument(LogitsProcessor):
    """encoder_repetition_penalty over all documents of a question, which transformers indexes wrongly."""

    def __init__(self, penalty: float, questions: Sequence[Question], num_beams: int) -> None:
        self.penalty, self.num_beams = penalty, num_beams
        self.tokens = [{t for c in q.contexts for t in c} for q in questions]

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(len(scores)):
            for token in self.tokens[row // self.num_beams]:
                score = scores[row, token]
                scores[row, token] = score / self.penalty if score < 0 else score * self.penalty
        return scores


def rag_token(model: Any, batch: Batch, settings: GenerationSettings) -> list[list[Answer]]:
    """RagTokenForGeneration.generate; scores where beams compete."""
    arguments = generation_arguments(settings)
    one_each = batch.n_docs == 1 and not batch.has_pads
    context = (
        contextlib.nullcontext() if one_each else _with_processors_of_all_documents(model, batch, settings)
    )
    torch.manual_seed(settings.seed)
    with context:
        out = model.generate(
            **batch.tensors(),
            n_docs=batch.n_docs,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
    rows = [trimmed(row, settings) for row in out.sequences.tolist()]
    scores = out.sequences_scores.tolist() if settings.is_beam_search else [None] * len(rows)
    answers = [Answer(row, score) for row, score in zip(rows, scores, strict=True)]
    return _grouped(answers, len(batch.questions))


@contextlib.contextmanager
def _with_processors_of_all_documents(
    model: Any, batch: Batch, settings: GenerationSettings
) -> Iterator[None]:
    """The two processors that read contexts read all of a question's, and no pads, in their usual places."""
    beams, size = settings.num_beams, settings.encoder_no_repeat_ngram_size
    instead = {
        EncoderRepetitionPenaltyLogitsProcessor: FavourTokensOfAnyDocument(
            settings.encoder_repetition_penalty, batch.questions, beams
        ),
        EncoderNoRepeatNGramLogitsProcessor: NoNgramOfAnyDocument(size, batch.questions, beams),
    }
    stock = model._get_logits_processor

    def processors(**kwargs: Any) -> LogitsProcessorList:
        return LogitsProcessorList([instead.get(type(p), p) for p in stock(**kwargs)])

    model._get_logits_processor = processors
    try:
        yield
    finally:
        del model._get_logits_processor


class RecordingRagSequence(RagSequenceForGeneration):
    """The stock class; remembers the loss of each question's candidates."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if getattr(self, "losses", None) is not None:
            self.losses.append(outputs.loss)
        return outputs


class MathematicalRagSequence(RecordingRagSequence):
    """The prior counts always, and each candidate's own BOS is left out: Compatibility.MASKED's scores."""

    def get_nll(
        self,
        seq_logits: Tensor,
        doc_scores: Tensor,
        target: Tensor,
        reduce_loss: bool = False,
        epsilon: float = 0.0,
        exclude_bos_score: bool = False,
        n_docs: int | None = None,
    ) -> Tensor:
        pad, bos = self.config.generator.pad_token_id, self.config.generator.bos_token_id
        n_docs = n_docs or self.config.n_docs
        log_probs = seq_logits.log_softmax(-1).unflatten(0, (-1, n_docs))
        losses = []
        for candidate, rows, scores in zip(target.tolist(), log_probs, doc_scores, strict=True):
            total = scores.log_softmax(0)
            for position, token in enumerate(candidate[1:]):
                if token == pad or (exclude_bos_score and position == 0 and token == bos):
                    continue
                total = total + rows[:, position, token]
            losses.append(-total.logsumexp(0))
        return torch.stack(losses)


@contextlib.contextmanager
def _with_mask(generator: Any, batch: Batch, settings: GenerationSettings) -> Iterator[None]:
    """The generator's generate gets the mask of its rows, and fills what it returns with pads."""
    stock = generator.generate
    masks = iter(batch.tensors()["context_attention_mask"].split(batch.n_docs))

    def generate(input_ids: Tensor, **kwargs: Any) -> Tensor:
        rows = stock(input_ids, **(kwargs | {"attention_mask": next(masks)}))
        kept = [trimmed(row, settings) for row in rows.tolist()]
        fill = [[settings.pad_token_id] * (rows.shape[1] - len(row)) for row in kept]
        return torch.tensor([row + rest for row, rest in zip(kept, fill, strict=True)])

    generator.generate = generate
    try:
        yield
    finally:
        del generator.generate


def rag_sequence(
    model: RecordingRagSequence,
    batch: Batch,
    settings: GenerationSettings,
    *,
    masked: bool,
    do_deduplication: bool = True,
) -> list[list[Answer]]:
    """RagSequenceForGeneration.generate and the losses it ranked by; masked puts the mask in."""
    context = _with_mask(model.generator, batch, settings) if masked else contextlib.nullcontext()
    model.losses = []
    torch.manual_seed(settings.seed)
    arguments = generation_arguments(settings) | _both_minima(settings)
    try:
        with context:
            rows = model.generate(
                **batch.tensors(), n_docs=batch.n_docs, do_deduplication=do_deduplication, **arguments
            )
        losses = model.losses
    finally:
        model.losses = None
    best = [(-loss).topk(settings.num_return_sequences)[0].tolist() for loss in losses]
    scores = [score for question in best for score in question]
    answers = [Answer(trimmed(r, settings), s) for r, s in zip(rows.tolist(), scores, strict=True)]
    return _grouped(answers, len(batch.questions))


def _grouped(answers: list[Answer], count: int) -> list[list[Answer]]:
    each = len(answers) // count
    return [answers[i * each : (i + 1) * each] for i in range(count)]
