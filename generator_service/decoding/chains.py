"""Greedy search and plain sampling: hypotheses that do not compete (transformers generation/utils.py, _sample)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.decoding.search_state import SearchState
from generator_service.transfers import to_device
from generator_service.types import GenerationSettings


@dataclass(frozen=True)
class ChainState(SearchState):
    """Searches with the same number of chains; every tensor begins with [searches]."""

    running_log_probs: Tensor  # float32 [searches, chains, length, docs]: of each token under each document
    finished: Tensor  # bool [searches, chains]: the end token was generated
    lengths: Tensor  # int64 [searches, chains]: tokens generated, pads after the end not counted
    done: Tensor  # bool [searches]
    cur_len: Tensor  # int64 [searches]
    max_length: Tensor  # int64 [searches]
    pad: Tensor  # int64 [searches]


def start(settings: GenerationSettings, num_chains: int, num_docs: int, device: torch.device) -> ChainState:
    """A search of num_chains independent hypotheses that hold nothing but the start token."""
    length = settings.max_length
    running = torch.full((1, num_chains, length), settings.pad_token_id, dtype=torch.int64, device=device)
    running[:, :, 0] = settings.decoder_start_token_id
    return ChainState(
        running=running,
        running_log_probs=torch.zeros((1, num_chains, length, num_docs), device=device),
        finished=torch.zeros((1, num_chains), dtype=torch.bool, device=device),
        lengths=torch.zeros((1, num_chains), dtype=torch.int64, device=device),
        done=torch.full((1,), length <= 1, device=device),
        cur_len=torch.ones(1, dtype=torch.int64, device=device),
        max_length=torch.full((1,), length, dtype=torch.int64, device=device),
        pad=torch.full((1,), settings.pad_token_id, dtype=torch.int64, device=device),
        eos=to_device([settings.eos_token_ids or (-1,)], torch.int64, device),
    )


def advance(state: ChainState, token_ids: Tensor, token_log_probs: Tensor) -> ChainState:
    """One step: token_ids [searches, chains], token_log_probs [searches, chains, docs]."""
    token_ids = torch.where(state.finished, state.pad[:, None], token_ids)
    token_log_probs = token_log_probs.masked_fill(state.finished[:, :, None], 0.0)
    position = state.cur_len[:, None, None]
    running, history = state.running.clone(), state.running_log_probs.clone()
    running.scatter_(2, position.expand(-1, running.shape[1], 1), token_ids[:, :, None])
    history.scatter_(
        2, position[..., None].expand(-1, running.shape[1], 1, history.shape[3]), token_log_probs[:, :, None]
    )
    ends = (token_ids[:, :, None] == state.eos[:, None, :]).any(2)
    finished = state.finished | ends
    cur_len = state.cur_len + 1
    return dataclasses.replace(
        state,
        running=running,
        running_log_probs=history,
        lengths=state.lengths + (~state.finished).long(),
        finished=finished,
        cur_len=cur_len,
        done=state.done | finished.all(1) | (cur_len >= state.max_length),
    )
