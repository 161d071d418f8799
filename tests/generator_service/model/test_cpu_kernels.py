"""cpu_kernels.cpp against torch's own operations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator_service.model import attention, cpu_kernels
from generator_service.model.backbone import RowBatch, RowBlock
from generator_service.model.kv_cache import ContextStates, SelfCache
from generator_service.model.linears import Int8Linear

needs_library = pytest.mark.skipif(cpu_kernels.library() is None, reason="cpu_kernels were not built")


def test_the_library_is_built_wherever_there_is_a_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert cpu_kernels.library() is not None


def _block(contexts: list[ContextStates], slots: int, rows: int, heads: int, head_dim: int) -> RowBlock:
    cache = SelfCache(
        num_layers=2,
        num_contexts=len(contexts),
        heads=heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for count in (slots - rows, rows):
        cache.append(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    cache.keys.normal_()
    cache.values.normal_()
    ids = torch.zeros(rows, dtype=torch.int64)
    return RowBlock(ids, ids, contexts, cache, None)


def _without_library(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "library", lambda: None)
        return call()


@needs_library
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [63, 64, 65], [170, 2, 300, 40]])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 64), (1, 80), (2, 128)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_cross_attention_is_torchs(
    lengths: list[int],
    rows: int,
    heads: int,
    head_dim: int,
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(rows)
    projected = torch.randn(sum(lengths), 2 * 2 * heads * head_dim) / math.sqrt(head_dim)
    states = attention.cross_states(projected, lengths, 2, heads)
    contexts = [ContextStates(n, *pair, None) for n, pair in zip(lengths, states, strict=True)]
    batch = RowBatch(
        [_block(contexts[:1], 12, 2, heads, head_dim), _block(contexts, 12, rows, heads, head_dim)]
    )
    query = torch.randn(2 + rows * len(lengths), heads * head_dim)
    for layer in (0, 1):

        def attend(layer: int = layer) -> Tensor:
            return attention.cross_attention(query, batch, layer, heads, scale=scale)

        torch.testing.assert_close(attend(), _without_library(monkeypatch, attend), atol=1e-5, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("slots", [7, 8, 32, 77])
@pytest.mark.parametrize("masked", ["none", "ancestry", "bias"])
def test_self_attention_is_torchs_and_writes_the_same_cache(
    rows: int, slots: int, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(slots)
    heads, head_dim = 3, 32
    contexts = [ContextStates(1, None, None, None)] * 2
    mask = None
    if masked != "none":
        ancestry = torch.rand(rows, slots) < 0.4
        ancestry[:, slots - rows :] |= torch.eye(rows, dtype=torch.bool)
        mask = attention.ancestry_mask(ancestry, torch.float32)
        assert mask is not None
    if masked == "bias":
        mask = (mask + torch.randn(1, heads, rows, slots)).contiguous()
    batch = RowBatch(
        [_block(contexts, slots, rows, heads, head_dim), _block(contexts[:1], slots, rows, heads, head_dim)]
    )
    qkv = torch.randn(3 * rows, 3 * heads * head_dim)
    before = [block.cache.keys.clone() for block in batch.blocks]

    def attend() -> Tensor:
        return attention.self_attention(qkv, batch, [mask, mask], 1, heads, scale=None)

    got = attend()
    keys = [block.cache.keys.clone() for block in batch.blocks]
    values = [block.cache.values.clone() for block in batch.blocks]
    for block, old in zip(batch.blocks, before, strict=True):
        block.cache.keys.copy_(old)
    wanted = _without_library(monkeypatch, attend)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for block, key, value in zip(batch.blocks, keys, values, strict=True):
        assert torch.equal(block.cache.keys, key)
        assert torch.equal(block.cache.values, value)


@needs_library
def test_scores_far_apart_are_weighed_as_torch_weighs_them() -> None:
    keys, values = torch.randn(1, 1, 16, 40), torch.randn(1, 1, 40, 16)
    query = torch.randn(4, 16) * 100  # the softmax is all but one-hot
    got = cpu_kernels.cross_attention(query, [(keys.transpose(2, 3), values)], [4], 0, None)
    wanted = F.scaled_dot_product_attention(query[None, None], keys.transpose(2, 3), values)[0, 0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("bias", [True, False])
def test_int8_layers_give_the_same_bytes_and_all_but_the_same_sums(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(72, 40, bias=bias)
    x = torch.cat([torch.randn(3, 72) * 5, torch.zeros(1, 72), torch.randn(1, 72) * 1e-30])
    with torch.inference_mode():
        layer = Int8Linear(linear)
        scale = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).div(127)
        scale.clamp_min_(torch.finfo(torch.float32).tiny)
        wanted = (x * scale.reciprocal()).round().to(torch.int8)
        found, found_scale = cpu_kernels.quantize(x)
        assert torch.equal(found_scale, scale)
        assert torch.equal((found.to(torch.int16) - 128).to(torch.int8), wanted)
        plain = _without_library(monkeypatch, lambda: layer(x))
        torch.testing.assert_close(layer(x), plain, atol=1e-6, rtol=1e-6)
