"""Beam search over many questions at once, each at its own position (transformers generation/utils.py, _beam_search).

Scores of dead beams are -1e9, as in Hugging Face: float32 sums with it decide which duplicates survive.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.decoding.search_state import SearchState
from generator_service.transfers import to_device
from generator_service.types import EarlyStopping, GenerationSettings

DEAD = -1.0e9


@dataclass(frozen=True)
class BeamState(SearchState):
    """Searches with the same num_beams; every tensor begins with [searches]."""

    running_scores: Tensor  # float32 [searches, beams]: sums of processed log-probabilities
    running_log_probs: Tensor  # float32 [searches, beams, length, docs]: of each token under each document
    sequences: Tensor  # as running: completed hypotheses, best first
    scores: Tensor  # float32 [searches, beams]: with length penalty
    log_probs: Tensor  # as running_log_probs
    finished: Tensor  # bool [searches, beams]: the completed hypothesis is real
    lengths: Tensor  # int64 [searches, beams]: tokens generated in the completed hypothesis
    improvable: Tensor  # bool [searches]: Hugging Face's is_early_stop_heuristic_unsatisfied
    done: Tensor  # bool [searches]
    cur_len: Tensor  # int64 [searches]: tokens in a live hypothesis, the start token counted
    max_length: Tensor  # int64 [searches]
    length_penalty: Tensor  # float64 [searches]
    early_stopping: Tensor  # int64 [searches]: values of EarlyStopping


def start(settings: GenerationSettings, num_docs: int, device: torch.device) -> BeamState:
    """A search that holds nothing but the start token; num_docs is the width of its log-probability history."""
    beams, length = settings.num_beams, settings.max_length
    running = torch.full((1, beams, length), settings.beam_fill_token_id, dtype=torch.int64, device=device)
    running[:, :, 0] = settings.decoder_start_token_id
    scores = torch.full((1, beams), DEAD, device=device)
    running_scores = scores.clone()
    running_scores[:, 0] = 0.0
    history = torch.zeros((1, beams, length, num_docs), device=device)

    def scalar(value: float | bool, dtype: torch.dtype) -> Tensor:
        return torch.full((1,), value, dtype=dtype, device=device)

    return BeamState(
        running=running,
        running_scores=running_scores,
        running_log_probs=history,
        sequences=running.clone(),
        scores=scores,
        log_probs=history.clone(),
        finished=torch.zeros((1, beams), dtype=torch.bool, device=device),
        lengths=torch.zeros((1, beams), dtype=torch.int64, device=device),
        improvable=scalar(True, torch.bool),
        done=scalar(settings.max_length <= 1, torch.bool),
        cur_len=scalar(1, torch.int64),
        max_length=scalar(settings.max_length, torch.int64),
        length_penalty=scalar(settings.length_penalty, torch.float64),
        early_stopping=scalar(settings.early_stopping.value, torch.int64),
        eos=to_device([settings.eos_token_ids or (-1,)], torch.int64, device),
    )


def select_continuations(
    top_log_probs: Tensor, top_ids: Tensor, running_scores: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of all beams of each search.

    top_log_probs, top_ids: [searches, beams, k] with k >= keep or the whole vocabulary; running_scores
    [searches, beams]. Returns accumulated log-probabilities, parent beams and token ids, each [searches, keep].
    """
    width = top_ids.shape[2]
    accumulated = (top_log_probs + running_scores[:, :, None]).flatten(1)
    best, index = accumulated.topk(min(keep, accumulated.shape[1]))
    return best, index // width, top_ids.flatten(1).gather(1, index)


def advance(
    state: BeamState, log_probs: Tensor, parents: Tensor, token_ids: Tensor, token_log_probs: Tensor
) -> tuple[BeamState, Tensor]:
    """One step of every search.

    log_probs (accumulated), parents, token_ids: [searches, keep], the candidates, the first num_beams of which may
    complete; token_log_probs [searches, keep, docs]. Returns the new state and the parent of each live beam
    [searches, beams]. Searches that were done stay as they are in all that matters.
    """
    beams = state.running.shape[1]
    position = state.cur_len[:, None, None]
    candidates = _gather_beams(state.running, parents)
    candidates.scatter_(2, position.expand(-1, candidates.shape[1], 1), token_ids[:, :, None])
    history = _gather_beams(state.running_log_probs, parents)
    history.scatter_(
        2, position[..., None].expand(-1, history.shape[1], 1, history.shape[3]), token_log_probs[:, :, None]
    )
    ends = (token_ids[:, :, None] == state.eos[:, None, :]).any(2)
    ends = ends | (state.cur_len + 1 >= state.max_length)[:, None]

    live_scores = log_probs + ends.float() * DEAD
    survivors = live_scores.topk(beams)[1]
    completed = _complete(state, candidates, history, log_probs, ends)
    advanced = dataclasses.replace(
        completed,
        running=_gather_beams(candidates, survivors),
        running_scores=live_scores.gather(1, survivors),
        running_log_probs=_gather_beams(history, survivors),
        cur_len=state.cur_len + 1,
    )
    return _with_stopping(advanced, ends), parents.gather(1, survivors)


def is_real(state: BeamState) -> Tensor:
    """bool [searches, beams]: completed hypotheses but for the heirs of dead beams.

    Where fewer answers than beams are possible, transformers fills up with repetitions of score -1e9.
    """
    penalty = state.lengths.clamp_min(1).double() ** state.length_penalty[:, None]
    return state.finished & (state.scores * penalty > DEAD / 2)


def _complete(
    state: BeamState, candidates: Tensor, history: Tensor, log_probs: Tensor, ends: Tensor
) -> BeamState:
    """Merge candidates that ended into the completed hypotheses (_update_finished_beams)."""
    beams, keep = state.running.shape[1], log_probs.shape[1]
    just_finished = ends & (torch.arange(keep, device=ends.device) < beams)
    penalty = (state.cur_len.double() ** state.length_penalty).float()
    scores = log_probs / penalty[:, None]
    full = state.finished.all(1) & (state.early_stopping == EarlyStopping.FIRST_COMPLETE.value)
    scores = scores + full.float()[:, None] * DEAD
    scores = scores + (~state.improvable).float()[:, None] * DEAD
    scores = scores + (~just_finished).float() * DEAD

    merged = torch.cat([state.scores, scores], 1)
    best = merged.topk(beams)[1]
    length = state.cur_len[:, None].expand(-1, keep)
    return dataclasses.replace(
        state,
        sequences=_gather_beams(torch.cat([state.sequences, candidates], 1), best),
        scores=merged.gather(1, best),
        log_probs=_gather_beams(torch.cat([state.log_probs, history], 1), best),
        finished=torch.cat([state.finished, just_finished], 1).gather(1, best),
        lengths=torch.cat([state.lengths, length], 1).gather(1, best),
    )


def _with_stopping(state: BeamState, ends: Tensor) -> BeamState:
    """Whether each search goes on (_check_early_stop_heuristic, _beam_search_has_unfinished_sequences)."""
    never = (state.early_stopping == EarlyStopping.NEVER.value) & (state.length_penalty > 0)
    length = torch.where(never, state.max_length - 1, state.cur_len - 1)
    penalty = (length.double() ** state.length_penalty).float()
    best_possible = state.running_scores[:, :1] / penalty[:, None]
    worst_finished = torch.where(state.finished, state.scores.min(1, keepdim=True)[0], DEAD)
    improvable = state.improvable & (best_possible > worst_finished).any(1)
    full = state.finished.all(1) & (state.early_stopping == EarlyStopping.FIRST_COMPLETE.value)
    done = state.done | ~improvable | full | ends.all(1)
    return dataclasses.replace(state, improvable=improvable, done=done)


def _gather_beams(tensor: Tensor, index: Tensor) -> Tensor:
    """[searches, n, …] at index [searches, m] -> [searches, m, …]."""
    shape = index.shape + (1,) * (tensor.dim() - 2)
    return tensor.gather(1, index.view(shape).expand(*index.shape, *tensor.shape[2:]))
