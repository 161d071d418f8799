"""Chains: hypotheses that do not compete."""

from typing import Any

import torch

from generator_service.decoding import chains
from generator_service.types import GenerationSettings

CPU = torch.device("cpu")
END, PAD = 1, 9


def started(num_chains: int = 2, **changes: Any) -> chains.ChainState:
    neutral = {"max_length": 4, "eos_token_ids": (END,), "pad_token_id": PAD}
    return chains.start(GenerationSettings(**(neutral | changes)), num_chains, 1, CPU)


def test_chain_that_has_ended_takes_pads_and_no_probability() -> None:
    state = chains.advance(started(), torch.tensor([[END, 5]]), torch.tensor([[[-1.0], [-2.0]]]))
    assert state.finished.tolist() == [[True, False]]
    assert not state.done.any()
    state = chains.advance(state, torch.tensor([[6, 6]]), torch.tensor([[[-1.0], [-2.0]]]))
    assert state.running[0, :, :3].tolist() == [[0, END, PAD], [0, 5, 6]]
    assert state.lengths.tolist() == [[1, 2]]
    assert state.running_log_probs[0, :, 2, 0].tolist() == [0.0, -2.0]


def test_search_is_done_when_all_chains_have_ended_or_at_max_length() -> None:
    zeros = torch.zeros(1, 2, 1)
    assert chains.advance(started(), torch.tensor([[END, END]]), zeros).done.all()
    state = started()
    for last in (False, False, True):
        state = chains.advance(state, torch.tensor([[5, 6]]), zeros)
        assert bool(state.done) is last


def test_any_of_several_end_tokens_ends() -> None:
    state = started(num_chains=3, eos_token_ids=(END, 7))
    state = chains.advance(state, torch.tensor([[END, 7, 5]]), torch.zeros(1, 3, 1))
    assert state.finished.tolist() == [[True, True, False]]


def test_concatenate_and_select_keep_each_search_its_own() -> None:
    both = started(max_length=3, eos_token_ids=(END, 7)).joined_by(started(max_length=6, pad_token_id=2))
    assert both.running.shape == (2, 2, 6)
    assert both.eos.tolist() == [[END, 7], [END, -1]]
    second = both.select(torch.tensor([1]))
    assert (second.num_searches, second.max_length.tolist(), second.pad.tolist()) == (1, [6], [2])
