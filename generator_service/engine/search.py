"""One beam search or set of chains: RAG-Token's over all documents of a question, RAG-Sequence's over one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from generator_service.decoding import logits_processors, provenance, sampling
from generator_service.engine.messages import GenerateAnswer, Progress
from generator_service.engine.request import Request
from generator_service.model.backbone import RowBlock
from generator_service.model.kv_cache import ContextStates, SelfCache
from generator_service.types import GenerationSettings, Strategy


class PoolKey(NamedTuple):
    """Searches with equal keys share their state tensors."""

    beam: bool
    width: int
    keep: int
    num_docs: int


@dataclass(frozen=True)
class FoundHypothesis:
    """A hypothesis of a finished search: token ids with the start token, no pads.

    token_log_probs float32 [tokens generated, docs] on the host, no processor applied: zeros where the token was
    forced, unless they score candidates (Request.search_scores).
    """

    token_ids: list[int]
    score: float
    token_log_probs: Tensor


class Search:
    """What a search needs beside its rows in the pool's state."""

    def __init__(
        self,
        request: Request,
        document: int,
        settings: GenerationSettings,
        contexts: Sequence[ContextStates],
        context_token_ids: Sequence[Tensor],
        log_prior: Tensor,
        host_log_prior: Tensor,
        cache: SelfCache,
        *,
        num_chains: int,
    ) -> None:
        self.request, self.document, self.settings = request, document, settings
        self.contexts, self.log_prior, self.cache = contexts, log_prior, cache
        self._host_log_prior = host_log_prior
        self.cur_len = 1
        self.ancestry: Tensor | None = None  # bool [width, slots]
        self._context_token_ids = context_token_ids
        self.random = sampling.generator(settings.seed + document) if settings.do_sample else None
        self.key = PoolKey(
            beam=settings.is_beam_search,
            width=settings.num_beams if settings.is_beam_search else num_chains,
            keep=settings.beams_to_keep if settings.is_beam_search else 1,
            num_docs=len(contexts),
        )

    @property
    def rows(self) -> int:
        """Rows of the next step: one while all beams are the same."""
        return 1 if self.key.beam and self.cur_len == 1 else self.key.width

    @property
    def forced_token(self) -> int | None:
        """The only token that may come next, if there is one."""
        return logits_processors.forced_token(self.settings, self.cur_len)

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of the next token are asked for; of a forced one, where they score candidates."""
        return self.forced_token is None or self.request.search_scores

    @property
    def ends_forced(self) -> bool:
        """Whether the next token is known and the last, so that nothing need be computed."""
        return not self.wants_scores and self.cur_len == self.settings.max_length - 1

    @cached_property
    def processors(self) -> list[logits_processors.Processor]:
        """Made when first asked for: a step that needs none does not wait for their tensors."""
        return logits_processors.build(self.settings, self._context_token_ids, self.log_prior.device)

    @cached_property
    def warpers(self) -> list[logits_processors.Processor]:
        """As processors."""
        return logits_processors.build_warpers(self.settings, self.log_prior.device)

    def block(self, token_ids: Tensor, positions: Tensor, own: Tensor) -> RowBlock:
        """The rows of the next step.

        token_ids and positions int64 [rows] are the newest tokens of its hypotheses; own bool [rows, rows] says that a
        row sees itself.
        """
        self.cache.append(token_ids, positions)
        self.ancestry = own if self.ancestry is None else torch.cat([self.ancestry, own], dim=1)
        alone = len(token_ids) == 1
        return RowBlock(token_ids, positions, self.contexts, self.cache, None if alone else self.ancestry)

    def follow(self, parents: Tensor) -> None:
        """Beams have moved: parents int64 [width] names the row of the step that each continues."""
        if self.ancestry is not None:
            self.ancestry = self.ancestry[parents]

    def progress(self, token_ids: list[int], token_log_probs: Tensor, *, last: bool = False) -> Progress:
        """Tokens that follow those already streamed; token_log_probs float32 [tokens, docs] on the host."""
        posterior = provenance.token_posteriors(token_log_probs, self._host_log_prior, Strategy.RAG_TOKEN)
        return Progress(
            request_id=self.request.request_id,
            token_ids=token_ids,
            document_posterior=posterior.tolist(),
            last=last,
        )

    def rest(self, best_token_ids: list[int], found: Sequence[FoundHypothesis]) -> Progress:
        """The tokens of the best answer that were not streamed yet, once it is found."""
        best = next(h for h in found if h.token_ids == best_token_ids)
        sent = self.request.num_streamed
        return self.progress(best.token_ids[1 + sent :], best.token_log_probs[sent:], last=True)

    def processed(self, scores: Tensor, input_ids: Tensor) -> Tensor:
        """scores [rows, vocab] after the processors and warpers; input_ids [rows, cur_len]."""
        for processor in self.processors:
            scores = processor(input_ids, scores)
        if self.processors and not self.key.beam:
            scores = self._or_end(scores)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        # a beam with no token left is dead; warpers make nan of it
        return scores.masked_fill(scores.isnan(), float("-inf")) if self.warpers else scores

    def _or_end(self, scores: Tensor) -> Tensor:
        """scores [rows, vocab], but the end token alone in rows where the processors have left no token."""
        end = torch.full_like(scores[:1], float("-inf"))
        end[:, list(self.settings.eos_token_ids or (self.settings.pad_token_id,))] = 0.0
        return torch.where(scores.isneginf().all(dim=1, keepdim=True), end, scores)

    @property
    def is_rag_token(self) -> bool:
        """Whether scores are marginal log-probabilities, even of a single document."""
        work = self.request.work
        return isinstance(work, GenerateAnswer) and work.strategy is Strategy.RAG_TOKEN

    @property
    def banned_tokens(self) -> tuple[int, ...] | None:
        """The tokens that may not come next, where the likeliest others simply follow; else None."""
        return logits_processors.banned_tokens(self.settings, self.cur_len)
