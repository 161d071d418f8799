"""Beam search's state: joining, leaving, one step, and when it ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from generator_service.decoding import beam
from generator_service.types import EarlyStopping, GenerationSettings

CPU = torch.device("cpu")
END, PAD = 1, 9


def settings(**changes: Any) -> GenerationSettings:
    neutral = {"num_beams": 2, "max_length": 5, "eos_token_ids": (END,), "pad_token_id": PAD}
    return GenerationSettings(**(neutral | changes))


def step(state: beam.BeamState, *candidates: tuple[float, int, int]) -> tuple[beam.BeamState, Tensor]:
    """Candidates of one search: accumulated log-probability, parent beam, token."""
    scores, parents, tokens = zip(*candidates, strict=True)
    history = torch.zeros(1, len(candidates), state.running_log_probs.shape[3])
    return beam.advance(
        state, torch.tensor([scores]), torch.tensor([parents]), torch.tensor([tokens]), history
    )


def test_start_holds_one_live_beam_with_the_start_token() -> None:
    state = beam.start(settings(decoder_start_token_id=7), num_docs=3, device=CPU)
    assert state.running[0].tolist() == [[7, PAD, PAD, PAD, PAD]] * 2
    assert state.running_scores.tolist() == [[0.0, beam.DEAD]]
    assert state.running_log_probs.shape == (1, 2, 5, 3)
    assert not state.done.any()


def test_fill_is_the_end_token_where_the_pad_id_is_zero() -> None:
    state = beam.start(settings(pad_token_id=0), num_docs=1, device=CPU)
    assert state.running[0, 0].tolist() == [0, END, END, END, END]


def test_concatenate_widens_the_shorter_and_select_takes_back() -> None:
    short = beam.start(settings(max_length=3, eos_token_ids=(END, 4)), num_docs=1, device=CPU)
    long = beam.start(settings(max_length=6), num_docs=1, device=CPU)
    both = short.joined_by(long)
    assert both.num_searches == 2
    assert both.running.shape == (2, 2, 6)
    assert both.eos.tolist() == [[END, 4], [END, -1]]
    assert both.max_length.tolist() == [3, 6]
    again = both.select(torch.tensor([1]))
    assert again.running.tolist() == long.running.tolist()
    assert again.num_searches == 1


def test_select_keeps_the_order_of_its_index() -> None:
    states = [beam.start(settings(decoder_start_token_id=i), num_docs=1, device=CPU) for i in range(3)]
    all_three = states[0].joined_by(states[1]).joined_by(states[2])
    assert all_three.select(torch.tensor([2, 0])).running[:, 0, 0].tolist() == [2, 0]


def test_select_continuations_adds_scores_and_names_parents() -> None:
    top = torch.tensor([[[-1.0, -2.0], [-0.5, -9.0]]])
    ids = torch.tensor([[[4, 5], [6, 7]]])
    best, parents, tokens = beam.select_continuations(top, ids, torch.tensor([[0.0, -1.0]]), keep=3)
    assert best.tolist() == [[-1.0, -1.5, -2.0]]
    assert parents.tolist() == [[0, 1, 0]]
    assert tokens.tolist() == [[4, 6, 5]]


def test_select_continuations_takes_all_where_there_are_fewer() -> None:
    best, _, _ = beam.select_continuations(
        torch.zeros(1, 1, 2), torch.tensor([[[4, 5]]]), torch.zeros(1, 1), keep=4
    )
    assert best.shape == (1, 2)


def test_advance_moves_beams_and_names_their_parents() -> None:
    state = beam.start(settings(), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-2.0, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
    state, parents = step(state, (-2.0, 1, 5), (-2.5, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
    assert parents.tolist() == [[1, 0]]
    assert state.running[0, :, :3].tolist() == [[0, 6, 5], [0, 5, 6]]
    assert state.running_scores.tolist() == [[-2.0, -2.5]]
    assert state.cur_len.tolist() == [3]


def test_only_the_first_num_beams_candidates_may_complete() -> None:
    state = beam.start(settings(), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-2.0, 0, 6), (-3.0, 0, END), (-4.0, 0, 8))
    assert not state.finished.any()
    state = beam.start(settings(), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-2.0, 0, END), (-3.0, 0, 7), (-4.0, 0, 8))
    assert state.finished.tolist() == [[True, False]]
    assert state.running[0, :, 1].tolist() == [5, 7]
    assert state.lengths[0, 0] == 1


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_completed_scores_are_divided_by_length(length_penalty: float) -> None:
    state = beam.start(settings(length_penalty=length_penalty), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-2.0, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
    state, _ = step(state, (-3.0, 0, END), (-4.0, 0, 6), (-5.0, 0, 7), (-6.0, 0, 8))
    assert state.scores[0, 0].item() == pytest.approx(-3.0 / 2**length_penalty)


def test_everything_completes_at_max_length() -> None:
    state = beam.start(settings(max_length=2), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-2.0, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
    assert state.done.all()
    assert state.finished.all()
    assert state.sequences[0, :, 1].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("early_stopping", "done"), list(zip(EarlyStopping, (False, True, False), strict=True))
)
def test_first_complete_stops_as_soon_as_all_beams_are_full(
    early_stopping: EarlyStopping, done: bool
) -> None:
    state = beam.start(settings(early_stopping=early_stopping, max_length=9), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-4.0, 0, END), (-5.0, 0, 7), (-6.0, 0, 8))
    state, _ = step(state, (-1.5, 0, END), (-1.6, 0, 6), (-1.7, 0, 7), (-1.8, 0, 8))
    assert state.finished.all()
    assert bool(state.done) is done


def test_search_ends_when_no_live_beam_can_improve() -> None:
    state = beam.start(settings(max_length=9), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (-1.1, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
    state, _ = step(state, (-1.2, 0, END), (-1.3, 1, END), (-50.0, 0, 7), (-60.0, 1, 8))
    assert state.done.all()


def test_never_hopes_for_the_length_still_to_come() -> None:
    """The same step ends a search with the heuristic and not with "never", whose penalty is that of max_length."""
    ended = {}
    for early_stopping in (EarlyStopping.HEURISTIC, EarlyStopping.NEVER):
        begun = settings(early_stopping=early_stopping, max_length=101)
        state = beam.start(begun, num_docs=1, device=CPU)
        state, _ = step(state, (-1.0, 0, 5), (-1.1, 0, 6), (-3.0, 0, 7), (-4.0, 0, 8))
        state, _ = step(state, (-1.2, 0, END), (-1.3, 1, END), (-50.0, 0, 7), (-60.0, 1, 8))
        ended[early_stopping] = bool(state.done)
    assert ended == {EarlyStopping.HEURISTIC: True, EarlyStopping.NEVER: False}


def test_searches_of_one_state_do_not_touch_one_another() -> None:
    one = beam.start(settings(max_length=3), num_docs=1, device=CPU)
    two = beam.start(settings(max_length=6, length_penalty=0.0), num_docs=1, device=CPU)
    candidates = [(-1.0, 0, 5), (-2.0, 0, END), (-3.0, 0, 7), (-4.0, 0, 8)]
    scores, parents, tokens = (torch.tensor([x, x]) for x in zip(*candidates, strict=True))
    both, _ = beam.advance(one.joined_by(two), scores, parents, tokens, torch.zeros(2, 4, 1))
    for index, alone in enumerate((one, two)):
        expected, _ = step(alone, *candidates)
        mine = both.select(torch.tensor([index]))
        assert mine.scores.tolist() == expected.scores.tolist()
        assert mine.running[0, :, :3].tolist() == expected.running[0, :, :3].tolist()
        assert mine.done.tolist() == expected.done.tolist()


def test_history_follows_the_beams() -> None:
    state = beam.start(settings(), num_docs=2, device=CPU)
    scores, parents, tokens = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0, 0]]), torch.tensor([[5, 6]])
    state, _ = beam.advance(state, scores, parents, tokens, torch.tensor([[[-1.0, -1.5], [-2.0, -2.5]]]))
    state, _ = beam.advance(state, scores, torch.tensor([[1, 1]]), tokens, torch.zeros(1, 2, 2))
    assert state.running_log_probs[0, :, 1].tolist() == [[-2.0, -2.5]] * 2


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_heirs_of_dead_beams_are_not_real(length_penalty: float) -> None:
    state = beam.start(settings(max_length=3, length_penalty=length_penalty), num_docs=1, device=CPU)
    state, _ = step(state, (-1.0, 0, 5), (beam.DEAD, 1, 5), (float("-inf"), 0, 7), (float("-inf"), 0, 8))
    state, _ = step(state, (-2.0, 0, END), (beam.DEAD, 1, END), (float("-inf"), 0, 7), (float("-inf"), 0, 8))
    assert beam.is_real(state).tolist() == [[True, False]]
