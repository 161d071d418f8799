"""Grouped attention over the arena: a Triton kernel where there is one, torch's own attention elsewhere."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from generator_service.model.paged.arena import PAGE_SLOTS
from generator_service.model.paged.reads import TILE_ROWS, Reads, Visible


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Reads,
    heads: int,
    *,
    scale: float | None,
    visible: Visible | None,
) -> Tensor:
    """query [rows, inner] over keys and values [slots, inner] -> [rows, inner]; zeros in rows of no tile.

    Softmax is in float32. Each tile's keys and values are read once for all its rows.
    """
    head_dim = query.shape[1] // heads
    scale = head_dim**-0.5 if scale is None else scale
    if has_kernels(query.device, head_dim):
        from generator_service.model.paged import kernels  # noqa: PLC0415  (Triton is there on CUDA only)

        return kernels.attend(query, keys, values, reads, heads, scale=scale, visible=visible)
    return dense(query, keys, values, reads, heads, scale=scale, visible=visible)


def has_kernels(device: torch.device, head_dim: int) -> bool:
    """Whether the Triton kernels run there: heads of 16 or more, a power of two wide."""
    fits = head_dim >= PAGE_SLOTS and head_dim & (head_dim - 1) == 0
    return device.type == "cuda" and fits and importlib.util.find_spec("triton") is not None


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Reads,
    heads: int,
    *,
    scale: float,
    visible: Visible | None,
) -> Tensor:
    """The same in torch: every tile padded to TILE_ROWS rows and reads.longest slots."""
    device, num_rows = query.device, query.shape[0]
    first, count = reads.tiles[:, :1], reads.tiles[:, 1:2]
    begin, length = reads.tiles[:, reads.column, None], reads.tiles[:, reads.column + 1, None]
    row, slot = torch.arange(TILE_ROWS, device=device), torch.arange(reads.longest, device=device)
    real = row < count  # [tiles, rows]
    rows = torch.where(real, first + row, 0)
    there = slot < length  # [tiles, slots]
    page = reads.pages[torch.where(there, begin + slot // PAGE_SLOTS, 0)]
    slots = torch.where(there, page * PAGE_SLOTS + slot % PAGE_SLOTS, 0)
    seen = there[:, None, :] | ~real[:, :, None]  # [tiles, rows, slots]; a row that is none may see anything
    bias: Tensor | None = None
    if visible is not None:
        bits = visible.words[rows][:, :, slot // 32] >> (slot % 32)
        seen = seen & ((bits & 1).bool() | ~real[:, :, None])
        if visible.bias is not None:
            distance = visible.positions[rows][:, :, None] - visible.slot_positions[slots][:, None, :]
            bias = visible.bias[:, distance.clamp(0, visible.bias.shape[1] - 1)].transpose(0, 1)
    mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))[:, None]
    mask = mask if bias is None else mask + bias
    q, k, v = (
        t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query[rows], keys[slots], values[slots])
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(query.dtype), scale=scale)
    out = query.new_zeros((num_rows + 1, query.shape[1]))  # the last takes what rows that are none give
    where = torch.where(real, rows, num_rows).flatten()
    out.index_copy_(0, where, attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return out[:num_rows]
