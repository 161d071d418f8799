"""The append-only self-attention cache."""

import torch
from torch import Tensor

from generator_service.model.kv_cache import SelfCache


def new_cache(num_layers: int = 2, num_contexts: int = 3) -> SelfCache:
    return SelfCache(
        num_layers=num_layers,
        num_contexts=num_contexts,
        heads=4,
        head_dim=5,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def rows(count: int, value: float) -> Tensor:
    return torch.full((3, 4, count, 5), value)


def test_slots_keep_what_was_written_while_the_cache_grows() -> None:
    cache = new_cache()
    for step in range(60):
        cache.append(torch.tensor([step, step]), torch.tensor([step, step]))
        for layer in range(2):
            keys, values = cache.write(layer, rows(2, step + layer), rows(2, -step - layer))
    assert cache.num_slots == 120
    assert keys.shape == values.shape == (3, 4, 120, 5)
    expected = torch.arange(60.0).repeat_interleave(2)
    assert torch.equal(keys[1, 2, :, 3], expected + 1)
    assert torch.equal(values[1, 2, :, 3], -expected - 1)
    assert torch.equal(cache.keys[0, 0, 0, :120, 0], expected)
    assert torch.equal(cache.token_ids[:120], expected.long())
    assert torch.equal(cache.positions[:120], expected.long())


def test_many_rows_at_once_fit() -> None:
    cache = new_cache()
    cache.append(torch.arange(500), torch.arange(500))
    keys, _ = cache.write(0, rows(500, 1.0), rows(500, 2.0))
    assert keys.shape[2] == 500


def test_growth_is_geometric() -> None:
    """One reallocation a step would make long answers quadratic."""
    cache, sizes = new_cache(), set()
    for step in range(1000):
        cache.append(torch.tensor([step]), torch.tensor([step]))
        sizes.add(cache.keys.shape[3])
    assert len(sizes) <= 6


def test_cache_without_layers_holds_tokens_alone() -> None:
    cache = new_cache(num_layers=0)
    cache.append(torch.arange(100), torch.arange(100))
    assert cache.size_bytes == 0
    assert cache.token_ids[:100].tolist() == list(range(100))
