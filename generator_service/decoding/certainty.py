"""What of an answer is certain before it is finished: what all hypotheses that may still be the best begin with."""

from __future__ import annotations

import torch
from torch import Tensor

from generator_service.decoding import beam
from generator_service.decoding.beam import BeamState
from generator_service.decoding.chains import ChainState


def of_beams(state: BeamState, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the searches at index [n] are certain of.

    The best answer will be the best completed hypothesis or one that a live beam becomes. Completed hypotheses that
    are worse than the best one can only fall, and dead beams never come back: neither has a say.

    Returns the length of the certain prefix int64 [n], the start token counted and 0 where nothing is left that may
    win; a hypothesis that begins with it int64 [n, length]; and its log-probabilities float32 [n, length, docs].
    """
    state = state.select(index)
    real = beam.is_real(state)
    best = state.scores.masked_fill(~real, float("-inf")).amax(1, keepdim=True)
    may_win = torch.cat([state.running_scores > beam.DEAD / 2, real & (state.scores == best)], 1)
    live_lengths = state.cur_len[:, None].expand_as(state.running_scores)
    return _shared(
        torch.cat([state.running, state.sequences], 1),
        torch.cat([state.running_log_probs, state.log_probs], 1),
        torch.cat([live_lengths, state.lengths + 1], 1),
        may_win,
    )


def of_chains(state: ChainState, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of chains: with one chain, all its tokens; of several, any may turn out to be the likeliest."""
    state = state.select(index)
    every = torch.ones_like(state.finished)
    return _shared(state.running, state.running_log_probs, state.lengths + 1, every)


def _shared(
    rows: Tensor, log_probs: Tensor, lengths: Tensor, may_win: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, hypotheses, length], log_probs [n, hypotheses, length, docs], lengths and may_win [n, hypotheses]."""
    searches = torch.arange(rows.shape[0], device=rows.device)
    some = may_win.long().argmax(1)
    example = rows[searches, some]
    position = torch.arange(rows.shape[2], device=rows.device)
    agrees = (rows == example[:, None]) & (position < lengths[..., None])
    agrees = (agrees | ~may_win[..., None]).all(1) & may_win.any(1)[:, None]
    return agrees.long().cumprod(1).sum(1), example, log_probs[searches, some]
