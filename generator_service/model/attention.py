"""Attention over packed rows: each context's keys and values are read once for all its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from generator_service.model import cpu_kernels
from generator_service.model.backbone import RowBatch
from generator_service.model.paged.rows import PagedRows

_PRODUCT_ROWS = 32
_PRODUCT_SCORES = 1 << 18


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Scaled dot-product attention: [contexts, heads, rows, head_dim] -> the same; an additive mask, or None.

    On the CPU two plain products take two thirds of the time of torch's own kernel, where rows are many, as of an
    encoder or a candidate tree, and their scores few enough for the caches.
    """
    rows, slots = query.shape[-2], keys.shape[-2]
    if not _by_products(query) or rows < _PRODUCT_ROWS or rows * slots > _PRODUCT_SCORES:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ keys.transpose(-1, -2)
    if mask is not None:
        scores += mask
    return torch.softmax(scores, dim=-1) @ values


def encoder_attention(
    qkv: Tensor, lengths: Sequence[int], heads: int, *, scale: float | None, bias: Tensor | None
) -> Tensor:
    """Full self-attention within each context of a packed batch.

    qkv [tokens, 3 * inner], lengths of the contexts in it, bias [1, heads, longest, longest] or None;
    returns [tokens, inner].
    """
    query, key, value = (part.view(part.shape[0], heads, -1).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    out = torch.empty_like(qkv[:, : qkv.shape[1] // 3])
    start = 0
    for length in lengths:
        end = start + length
        mask = None if bias is None else bias[:, :, :length, :length]
        attended = attend(
            query[None, :, start:end], key[None, :, start:end], value[None, :, start:end], mask, scale
        )
        out[start:end] = attended[0].transpose(0, 1).flatten(1)
        start = end
    return out


def self_attention(
    qkv: Tensor,
    batch: RowBatch,
    masks: Sequence[Tensor | None],
    layer: int,
    heads: int,
    *,
    scale: float | None,
) -> Tensor:
    """Attention of rows to their ancestors; writes the rows' keys and values into the caches.

    qkv [rows, 3 * inner]; masks are additive [1, heads or 1, rows, slots] a block, or None; returns [rows, inner].
    """
    if isinstance(batch, PagedRows):
        return batch.self_attention(qkv, layer, heads, scale=scale)
    inner = qkv.shape[1] // 3
    out = torch.empty((qkv.shape[0], inner), dtype=qkv.dtype, device=qkv.device)
    native = cpu_kernels.can_attend(qkv, inner // heads)
    for (block, start, end), mask in zip(batch.spans(), masks, strict=True):
        if native:
            slots = block.cache.num_slots
            keys, values = block.cache.keys[layer], block.cache.values[layer]
            cpu_kernels.self_attention(qkv[start:end], keys, values, slots, mask, scale, out[start:end])
            continue
        # [contexts * rows, 3 * inner] -> three of [contexts, heads, rows, head_dim]
        parts = qkv[start:end].view(len(block.contexts), -1, 3, heads, inner // heads).permute(2, 0, 3, 1, 4)
        keys, values = block.cache.write(layer, parts[1], parts[2])
        attended = attend(parts[0], keys, values, mask, scale)
        out[start:end] = attended.transpose(1, 2).reshape(end - start, inner)
    return out


def cross_attention(query: Tensor, batch: RowBatch, layer: int, heads: int, *, scale: float | None) -> Tensor:
    """Attention of rows to their context: query [rows, inner] -> [rows, inner]. No pads, so no masks."""
    if isinstance(batch, PagedRows):
        return batch.cross_attention(query, layer, heads, scale=scale)
    if cpu_kernels.can_attend(query, query.shape[1] // heads):
        return _cross_attention_at_once(query, batch, layer, heads, scale)
    out = torch.empty_like(query)
    for block, start, _ in batch.spans():
        rows = int(block.token_ids.shape[0])
        for index, context in enumerate(block.contexts):
            assert context.keys is not None
            assert context.values is not None
            low = start + index * rows
            part = query[low : low + rows].view(rows, heads, -1).transpose(0, 1)
            keys, values = context.keys[layer], context.values[layer]
            if block.cross_attention is not None:
                block.cross_attention.add(index, part, keys, scale)
            attended = _attend_context(part, keys, values, scale)
            out[low : low + rows].view(rows, heads, -1).copy_(attended.transpose(0, 1))
    return out


def _cross_attention_at_once(
    query: Tensor, batch: RowBatch, layer: int, heads: int, scale: float | None
) -> Tensor:
    """As cross_attention, in one call for all contexts."""
    states: list[tuple[Tensor, Tensor]] = []
    counts: list[int] = []
    for block, start, _ in batch.spans():
        rows = int(block.token_ids.shape[0])
        for index, context in enumerate(block.contexts):
            assert context.keys is not None
            assert context.values is not None
            states.append((context.keys, context.values))
            counts.append(rows)
            if block.cross_attention is not None:
                low = start + index * rows
                part = query[low : low + rows].view(rows, heads, -1).transpose(0, 1)
                block.cross_attention.add(index, part, context.keys[layer], scale)
    return cpu_kernels.cross_attention(query, states, counts, layer, scale)


def _attend_context(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """[heads, rows, head_dim] -> the same; keys and values as cross_states lays them out."""
    if not _by_products(query):
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale)[0]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows_at_once = max(_PRODUCT_ROWS, _PRODUCT_SCORES // keys.shape[1])
    attended = [
        torch.bmm(_probabilities(part, keys, factor), values)
        for part in torch.split(query, rows_at_once, dim=1)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


def _probabilities(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    nothing = query.new_empty((1, 1, 1))
    scores = torch.baddbmm(nothing, query, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.softmax(scores, dim=-1)


def _by_products(states: Tensor) -> bool:
    """Where torch's own attention is slower than the products that it is made of."""
    return states.device.type == "cpu" and states.dtype == torch.float32


def ancestry_mask(ancestry: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """bool [rows, slots] -> additive [1, 1, rows, slots]."""
    if ancestry is None:
        return None
    mask = torch.zeros(ancestry.shape, dtype=dtype, device=ancestry.device)
    return mask.masked_fill_(~ancestry, float("-inf"))[None, None]


def concatenated(*linears: torch.nn.Linear) -> torch.nn.Linear:
    """One linear layer that computes several of the same input side by side.

    The layers' own parameters become views of its own: whoever runs them still holds no second copy.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    merged = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None)
    merged.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])
        merged.bias = torch.nn.Parameter(bias, requires_grad=False)
    start = 0
    for linear in linears:
        part = slice(start, start + linear.weight.shape[0])
        linear.weight = torch.nn.Parameter(merged.weight.detach()[part], requires_grad=False)
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(merged.bias.detach()[part], requires_grad=False)
        start = part.stop
    return merged


def cross_states(
    projected: Tensor, lengths: Sequence[int], num_layers: int, heads: int
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each context, both [layers, heads, length, head_dim].

    projected is [tokens, 2 * layers * inner], layer by layer keys and then values. On the CPU keys lie in memory as
    [layers, heads, head_dim, length]: a product with few rows reads them a quarter faster so.
    """
    states = []
    for part in torch.split(projected, list(lengths)):
        keys, values = part.view(part.shape[0], num_layers, 2, heads, -1).unbind(2)
        if _by_products(projected):
            laid_out = keys.permute(1, 2, 3, 0).contiguous().transpose(2, 3)
        else:
            laid_out = keys.permute(1, 2, 0, 3).contiguous()
        states.append((laid_out, values.permute(1, 2, 0, 3).contiguous()))
    return states
