"""The likeliest tokens of rows of which some may not follow."""

import pytest
import torch

from generator_service.decoding import marginalize, top_tokens


@pytest.mark.parametrize("banned", [(), (3,), (0, 7, 11)])
@pytest.mark.parametrize("keep", [1, 4, 12])
def test_likeliest_are_those_of_logits_without_the_banned(banned: tuple[int, ...], keep: int) -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(keep))
    logits[1, 3] = logits[2, 7] = 9.0
    values, ids = top_tokens.likeliest(logits, keep, banned)
    without = logits.clone()
    without[:, list(banned)] = float("-inf")
    expected, places = without.topk(keep)
    assert torch.equal(values, expected)
    possible = expected > float("-inf")
    assert torch.equal(ids[possible], places[possible])
    assert values.shape == ids.shape == (5, keep)
    assert all(len(set(row)) == keep for row in ids.tolist())


def _logits(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(7)) + 40.0


@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_logsumexp_is_that_of_each_row(scale: float) -> None:
    logits = _logits(70, 513, scale=scale)
    torch.testing.assert_close(top_tokens.logsumexp(logits), logits.double().logsumexp(1).float())
    torch.testing.assert_close(
        top_tokens.logsumexp(logits.bfloat16()), logits.bfloat16().double().logsumexp(1).float()
    )


def test_mixed_is_the_mixture_over_documents() -> None:
    logits, log_prior = _logits(5, 4, 513), torch.log_softmax(torch.randn(5), dim=0)
    mixture, lse = top_tokens.mixed(logits, log_prior)
    torch.testing.assert_close(lse, logits.logsumexp(2))
    expected = marginalize.rag_token_mixture(logits - lse[:, :, None], log_prior)
    torch.testing.assert_close(mixture.log(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("banned", [(), (3, 500)])
def test_likeliest_mixed_are_the_best_of_the_mixture(banned: tuple[int, ...]) -> None:
    log_prior = torch.tensor([0.0, -torch.inf, -torch.inf])
    mixture, lse = top_tokens.mixed(_logits(3, 4, 513), log_prior)
    expected = _logits(3, 4, 513)[0] - lse[0][:, None]
    expected[:, list(banned)] = float("-inf")
    found = top_tokens.likeliest_mixed(mixture, 8, banned)
    assert found is not None
    values, ids = expected.topk(8)
    torch.testing.assert_close(found[0], values, atol=1e-5, rtol=1e-6)
    assert torch.equal(found[1], ids)


def test_likeliest_mixed_are_none_where_float32_cannot_tell_them() -> None:
    logits = _logits(3, 4, 513)
    logits[:, :, 9] += 90.0
    mixture, _ = top_tokens.mixed(logits, torch.log_softmax(torch.zeros(3), dim=0))
    assert top_tokens.likeliest_mixed(mixture, 1, ()) is not None
    assert top_tokens.likeliest_mixed(mixture, 2, ()) is None
    assert top_tokens.likeliest_mixed(mixture, 1, (9,)) is None
