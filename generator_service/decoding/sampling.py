"""Draws that depend on nothing but the question's own seed and scores."""

from __future__ import annotations

import torch
from torch import Tensor

from generator_service.transfers import to_device


def generator(seed: int) -> torch.Generator:
    """A random stream of its own: who shares the batch cannot move it. On the CPU, so that devices agree."""
    return torch.Generator().manual_seed(seed)


def draw_tokens(scores: Tensor, random: torch.Generator) -> Tensor:
    """One token a row from softmax(scores [rows, vocab]) -> int64 [rows]: torch.multinomial's on the CPU."""
    return _race(torch.softmax(scores.float(), dim=-1), random).argmax(dim=-1)


def draw_continuations(
    log_probs: Tensor, running_scores: Tensor, keep: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Beam sampling: keep continuations of one search, without replacement (_get_top_k_continuations).

    log_probs [beams, vocab], running_scores [beams]; returns accumulated log-probabilities, parents and token ids,
    each [keep], in the order drawn. Where fewer than keep continuations have any probability, dead ones fill up.
    """
    accumulated = (log_probs + running_scores[:, None]).flatten()
    probabilities = torch.softmax(accumulated, dim=-1)
    size = accumulated.shape[0]
    count = min(keep, size)
    # a search without any hope left has no probabilities at all
    finish, drawn = _race(probabilities.nan_to_num(0.0), random).topk(count)
    is_drawn = finish > 0
    # what was not drawn, best first, the drawn last of all
    taken = torch.zeros(size + 1, dtype=torch.bool, device=accumulated.device)
    taken.index_fill_(0, torch.where(is_drawn, drawn, size), True)
    rest = accumulated.clamp_min(torch.finfo(torch.float32).min).masked_fill(taken[:size], float("-inf"))
    dead = rest.topk(count)[1]
    place = torch.arange(count, device=accumulated.device)
    index = torch.where(is_drawn, drawn, dead[(place - is_drawn.sum()).clamp_min(0)])
    index = torch.cat([index, index[-1:].expand(keep - count)])
    return accumulated[index], index // log_probs.shape[1], index % log_probs.shape[1]


def _race(probabilities: Tensor, random: torch.Generator) -> Tensor:
    """The greatest are torch.multinomial's draws without replacement; zero where there is no probability.

    multinomial divides by exponential noise just so. Noise goes to the device, so that no probabilities come back.
    """
    noise = torch.empty(probabilities.shape).exponential_(generator=random)
    return probabilities / to_device(noise, torch.float32, probabilities.device)
