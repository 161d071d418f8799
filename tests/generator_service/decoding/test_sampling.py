"""Draws: a question's own stream, and probabilities of zero."""

import torch

from generator_service.decoding import sampling


def test_same_seed_draws_the_same_and_the_global_stream_is_left_alone() -> None:
    scores = torch.randn(6, 50)
    before = torch.random.get_rng_state()
    first = sampling.draw_tokens(scores, sampling.generator(3))
    again = sampling.draw_tokens(scores, sampling.generator(3))
    other = sampling.draw_tokens(scores, sampling.generator(4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokens_without_probability_are_never_drawn() -> None:
    scores = torch.full((200, 10), float("-inf"))
    scores[:, [2, 7]] = 0.0
    drawn = sampling.draw_tokens(scores, sampling.generator(0))
    assert set(drawn.tolist()) == {2, 7}


def test_continuations_are_drawn_without_replacement() -> None:
    log_probs = torch.randn(3, 8).log_softmax(-1)
    scores, parents, tokens = sampling.draw_continuations(
        log_probs, torch.zeros(3), 10, sampling.generator(0)
    )
    pairs = set(zip(parents.tolist(), tokens.tolist(), strict=True))
    assert len(pairs) == 10
    torch.testing.assert_close(scores, log_probs[parents, tokens])


def test_dead_continuations_fill_up_where_too_few_are_possible() -> None:
    log_probs = torch.full((2, 4), float("-inf"))
    log_probs[0, 1] = log_probs[1, 3] = 0.0
    scores, parents, tokens = sampling.draw_continuations(
        log_probs, torch.tensor([0.0, -1.0]), 4, sampling.generator(0)
    )
    assert set(zip(parents[:2].tolist(), tokens[:2].tolist(), strict=True)) == {(0, 1), (1, 3)}
    assert scores[2:].isneginf().all()
    assert len(set(zip(parents.tolist(), tokens.tolist(), strict=True))) == 4


def test_continuations_where_none_is_possible_are_all_dead() -> None:
    log_probs = torch.full((2, 4), float("-inf"))
    scores, _, _ = sampling.draw_continuations(log_probs, torch.zeros(2), 4, sampling.generator(0))
    assert scores.shape == (4,)
    assert scores.isneginf().all()
