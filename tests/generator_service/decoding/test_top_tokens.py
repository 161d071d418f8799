"""The likeliest tokens of rows of which some may not follow."""

import pytest
import torch

from generator_service.decoding import top_tokens


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
