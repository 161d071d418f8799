"""What the decoder said of a pool's rows in one step, and what the searches of the pool make of it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generator_service.decoding import top_tokens
from generator_service.decoding.picks import Pick, Picks
from generator_service.engine.search import PoolKey, Search
from generator_service.transfers import to_device


@dataclass(frozen=True)
class StepScores:
    """One search's part: float32 logits [docs, rows, vocab] and their logsumexp [docs, rows].

    Both None where the next token is forced. mixture: top_tokens.mixed's [rows, vocab], where the likeliest tokens
    are all that is wanted of RAG-Token's rows on a CPU.
    """

    logits: Tensor | None
    lse: Tensor | None
    mixture: Tensor | None = None


@dataclass(frozen=True)
class BestTokens:
    """Log-probabilities and ids [searches, width, k], best first; only rows of the searches in found are set."""

    log_probs: Tensor
    ids: Tensor
    found: frozenset[int]


@dataclass(frozen=True)
class PoolScores:
    """Rows stand search by search, in each document by document, then row by row.

    logits [rows, vocab] as the head gives them, lse float32 [rows], their logsumexp; None where every next token is
    forced. first: each search's first row, None where its next token is forced. mixtures: by index of the search.
    """

    key: PoolKey
    searches: Sequence[Search]
    logits: Tensor | None
    lse: Tensor | None
    first: Sequence[int | None]
    mixtures: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of_logits(
        cls, key: PoolKey, searches: Sequence[Search], logits: Tensor, first: Sequence[int | None]
    ) -> PoolScores:
        """Normalises logits, and mixes documents where that comes at little more."""
        if key.num_docs == 1 or logits.device.type != "cpu":
            return cls(key, searches, logits, top_tokens.logsumexp(logits), first)
        lse = torch.empty(len(logits), device=logits.device)
        mixtures = dict[int, Tensor]()
        for index, (search, start) in enumerate(zip(searches, first, strict=True)):
            if start is None:
                continue
            rows = slice(start, start + key.num_docs * search.rows)
            if search.banned_tokens is None:
                lse[rows] = top_tokens.logsumexp(logits[rows])
                continue
            by_document = logits[rows].view(key.num_docs, search.rows, -1)
            mixtures[index], own = top_tokens.mixed(by_document, search.log_prior)
            lse[rows] = own.flatten()
        return cls(key, searches, logits, lse, first, mixtures)

    def of(self, index: int) -> StepScores:
        """The scores of one search."""
        first = self.first[index]
        if self.logits is None or self.lse is None or first is None:
            return StepScores(None, None)
        rows = slice(first, first + self.key.num_docs * self.searches[index].rows)
        logits = self.logits[rows].view(self.key.num_docs, -1, self.logits.shape[1])
        lse = self.lse[rows].view(self.key.num_docs, -1)
        return StepScores(logits.float(), lse, self.mixtures.get(index))

    def best_tokens(self) -> BestTokens | None:
        """Of all searches that ask for no more than their likeliest tokens; None without kernels or such searches."""
        if self.logits is None or self.lse is None or not top_tokens.fits(self.logits, self.key.keep):
            return None
        picks, found = [], set()
        for index, (search, first) in enumerate(zip(self.searches, self.first, strict=True)):
            banned = search.banned_tokens
            if first is None or banned is None or len(banned) > top_tokens.MAX_BANNED:
                continue
            found.add(index)
            picks += [
                Pick(first + row, search.rows, index, index * self.key.width + row, banned)
                for row in range(search.rows)
            ]
        if not picks:
            return None
        log_probs, ids = top_tokens.best_tokens(
            self.logits,
            self.lse,
            # one document is certain
            None if self.key.num_docs == 1 else torch.stack([s.log_prior for s in self.searches]),
            Picks.of(picks, self.logits.device),
            min(self.key.keep, self.logits.shape[1]),
            len(self.searches) * self.key.width,
        )
        shape = (len(self.searches), self.key.width, -1)
        return BestTokens(log_probs.view(shape), ids.view(shape), frozenset(found))

    def token_log_probs(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """log p(token | document, prefix) of continuations [searches, n] -> [searches, n, docs].

        parents are rows of their searches. Zeros where tokens are forced.
        """
        if self.logits is None or self.lse is None:
            return torch.zeros((*tokens.shape, self.key.num_docs), device=tokens.device)
        table = [
            (s.rows, first or 0, first is None) for s, first in zip(self.searches, self.first, strict=True)
        ]
        rows, first, forced = to_device(table, torch.int64, tokens.device).T[:, :, None]  # [searches, 1] each
        documents = torch.arange(self.key.num_docs, device=tokens.device)
        row = first + torch.minimum(parents, rows - 1)
        row = row[:, :, None] + (rows * documents)[:, None]  # [searches, n, docs]
        is_forced = forced.bool()[:, :, None]
        row = row.masked_fill(is_forced, 0)  # a search without scores has no row of its own
        log_probs = self.logits[row, tokens[:, :, None]].float() - self.lse[row]
        return log_probs.masked_fill(is_forced, 0.0)
