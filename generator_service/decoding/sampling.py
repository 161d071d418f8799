"""Draws that depend on nothing but the question's own seed and scores."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A random stream of its own: who shares the batch cannot move it. On the CPU, so that devices agree."""
    return torch.Generator().manual_seed(seed)


def draw_tokens(scores: Tensor, random: torch.Generator) -> Tensor:
    """One token a row from softmax(scores [rows, vocab]) -> int64 [rows]."""
    probabilities = torch.softmax(scores.float(), dim=-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=random).squeeze(1).to(scores.device)


def draw_continuations(
    log_probs: Tensor, running_scores: Tensor, keep: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Beam sampling: keep continuations of one search, without replacement (_get_top_k_continuations).

    log_probs [beams, vocab], running_scores [beams]; returns accumulated log-probabilities, parents and token ids,
    each [keep], in the order drawn. Where fewer than keep continuations have any probability, dead ones fill up.
    """
    accumulated = (log_probs + running_scores[:, None]).flatten()
    probabilities = torch.softmax(accumulated, dim=-1).cpu()
    possible = int((probabilities > 0).sum())
    index = torch.empty(0, dtype=torch.int64)
    if possible:
        index = torch.multinomial(probabilities, min(keep, possible), generator=random)
    if possible < keep:
        rest = accumulated.cpu().clone()
        rest[index] = float("-inf")
        index = torch.cat([index, rest.topk(keep - possible)[1]])
    index = index.to(log_probs.device)
    return accumulated[index], index // log_probs.shape[1], index % log_probs.shape[1]
