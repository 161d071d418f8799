"""The logits processors of a search, in the order of Hugging Face's _get_logits_processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from generator_service.transfers import to_device
from generator_service.types import GenerationSettings

Processor = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [rows, length], scores [rows, vocab]) -> scores [rows, vocab]."""

_PROMPT_LENGTH = 1


class EncoderRepetitionPenalty:
    """Favours tokens of the contexts: of its own for RAG-Sequence, of all the question's for RAG-Token.

    Hugging Face's class takes rows to have one context each, which RAG-Token's have not (docs/parity.md).
    """

    def __init__(self, penalty: float, context_token_ids: Tensor) -> None:
        self._penalty = 1 / penalty
        self._ids = torch.unique(context_token_ids)

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Divide positive and multiply negative scores of the contexts' tokens."""
        chosen = scores[:, self._ids]
        chosen = torch.where(chosen < 0, chosen * self._penalty, chosen / self._penalty)
        return scores.index_copy(1, self._ids, chosen)


class AllowedSequences:
    """Leaves the tokens that may follow a prefix, from a set of allowed answers; anything else may only end.

    PrefixConstrainedLogitsProcessor of one search, whatever its number of rows: where other processors have forbidden
    all that is allowed to a row (to all rows of a beam search, which compete), the allowed tokens are forced.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], eos_token_ids: Sequence[int], *, rows_compete: bool
    ) -> None:
        self._root: dict[int, dict] = {}  # type: ignore[type-arg]  # a trie: token -> trie
        for sequence in sequences:
            node = self._root
            for token in sequence:
                node = node.setdefault(token, {})
        self._end = list(eos_token_ids)
        self._rows_compete = rows_compete

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids begin with the start token."""
        mask = torch.full_like(scores, float("-inf"))
        for row, prefix in enumerate(input_ids[:, _PROMPT_LENGTH:].tolist()):
            mask[row, self._following(prefix)] = 0.0
        allowed = scores + mask
        stuck = allowed.amax(dim=1, keepdim=True).isneginf()
        if self._rows_compete:
            stuck = stuck.all()
        return torch.where(stuck, mask, allowed)

    def _following(self, prefix: Sequence[int]) -> list[int]:
        node = self._root
        for token in prefix:
            if token not in node:
                return self._end
            node = node[token]
        return list(node) or self._end


def build(settings: GenerationSettings, contexts: Sequence[Tensor], device: torch.device) -> list[Processor]:
    """Processors that every strategy applies, without the sampling warpers; contexts are int64 [length] each."""
    s = settings
    eos = to_device(s.eos_token_ids, torch.int64, device)
    processors: list[Processor] = []
    if s.encoder_repetition_penalty != 1.0:
        processors.append(EncoderRepetitionPenalty(s.encoder_repetition_penalty, torch.cat(list(contexts))))
    if s.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.no_repeat_ngram_size > 0:
        processors.append(NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
    if s.encoder_no_repeat_ngram_size > 0:
        size = s.encoder_no_repeat_ngram_size
        processors.extend(
            EncoderNoRepeatNGramLogitsProcessor(size, cast(LongTensor, c[None])) for c in contexts
        )
    if s.bad_words_ids:
        words = [list(word) for word in s.bad_words_ids]
        processors.append(NoBadWordsLogitsProcessor(words, eos if s.eos_token_ids else None))
    if s.min_length > 0 and s.eos_token_ids:
        processors.append(MinLengthLogitsProcessor(s.min_length, eos, device=str(device)))
    if s.min_new_tokens > 0 and s.eos_token_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(_PROMPT_LENGTH, s.min_new_tokens, eos, device=str(device))
        )
    if s.allowed_sequences:
        processors.append(
            AllowedSequences(s.allowed_sequences, s.eos_token_ids, rows_compete=s.is_beam_search)
        )
    return processors + _forced_and_suppressed(s, device)


def _forced_and_suppressed(s: GenerationSettings, device: torch.device) -> list[Processor]:
    processors: list[Processor] = []
    # where forced_token answers, the search asks no scores at all
    if s.forced_bos_token_id is not None and forced_token(s, _PROMPT_LENGTH) is None:
        processors.append(ForcedBOSTokenLogitsProcessor(s.forced_bos_token_id))
    if s.forced_eos_token_id is not None and forced_token(s, s.max_length - 1) is None:
        processors.append(
            ForcedEOSTokenLogitsProcessor(s.max_length, s.forced_eos_token_id, device=str(device))
        )
    if s.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(list(s.suppress_tokens), device=str(device)))
    if s.begin_suppress_tokens:
        processors.append(
            SuppressTokensAtBeginLogitsProcessor(list(s.begin_suppress_tokens), _begin(s), device=str(device))
        )
    return processors


def build_warpers(settings: GenerationSettings, device: torch.device) -> list[Processor]:
    """Sampling's warpers; empty where nothing is sampled."""
    s = settings
    warpers: list[Processor] = []
    if s.do_sample:
        keep = len(s.eos_token_ids) + 1 if s.is_beam_search else 1
        if s.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k > 0:
            warpers.append(TopKLogitsWarper(s.top_k, min_tokens_to_keep=keep))
        if s.top_p < 1.0:
            warpers.append(TopPLogitsWarper(s.top_p, min_tokens_to_keep=keep))
        if s.min_p > 0.0:
            warpers.append(cast(Processor, MinPLogitsWarper(s.min_p, min_tokens_to_keep=keep)))
        if s.typical_p < 1.0:
            warpers.append(TypicalLogitsWarper(s.typical_p, min_tokens_to_keep=keep))
        if s.epsilon_cutoff > 0.0:
            warpers.append(EpsilonLogitsWarper(s.epsilon_cutoff, min_tokens_to_keep=keep))
        if s.eta_cutoff > 0.0:
            warpers.append(EtaLogitsWarper(s.eta_cutoff, min_tokens_to_keep=keep, device=str(device)))
    if s.renormalize_logits:
        warpers.append(LogitNormalization())
    return warpers


def banned_tokens(settings: GenerationSettings, cur_len: int) -> tuple[int, ...] | None:
    """The tokens that may not come next, where that is all the processors and warpers do there; else None."""
    s = settings
    does_more = (
        s.do_sample
        or s.renormalize_logits
        or s.encoder_repetition_penalty != 1.0
        or s.repetition_penalty != 1.0
        or s.no_repeat_ngram_size > 0
        or s.encoder_no_repeat_ngram_size > 0
        or s.bad_words_ids
        or s.allowed_sequences
        or (s.forced_bos_token_id is not None and cur_len == _PROMPT_LENGTH)
        or (s.forced_eos_token_id is not None and cur_len == s.max_length - 1)
    )
    if does_more:
        return None
    banned = [*s.suppress_tokens]
    if cur_len < s.min_length or cur_len - _PROMPT_LENGTH < s.min_new_tokens:
        banned += s.eos_token_ids
    if cur_len == _begin(s):
        banned += s.begin_suppress_tokens
    return tuple(dict.fromkeys(banned))


def _begin(settings: GenerationSettings) -> int:
    """Length of a hypothesis where begin_suppress_tokens act."""
    return _PROMPT_LENGTH if settings.forced_bos_token_id is None else _PROMPT_LENGTH + 1


def forced_token(settings: GenerationSettings, cur_len: int) -> int | None:
    """The only token that may come next, or None: what the forced processors, the last of all, would leave.

    None wherever another processor acts after or around them, so that the general way decides; and for a forced
    first token while sampling, so that the stream of draws is Hugging Face's.
    """
    if settings.suppress_tokens or settings.begin_suppress_tokens or settings.renormalize_logits:
        return None
    if settings.forced_eos_token_id is not None and cur_len == settings.max_length - 1:
        return settings.forced_eos_token_id
    if settings.forced_bos_token_id is not None and cur_len == _PROMPT_LENGTH and not settings.do_sample:
        return settings.forced_bos_token_id
    return None
