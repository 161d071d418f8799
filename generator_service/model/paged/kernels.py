"""Triton: attention of tiles of rows to pages of the arena, softmax in float32, nothing read twice.

On a CPU these run in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests hold them to torch's
attention; its products know no bfloat16.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from generator_service.model.paged.arena import PAGE_SLOTS
from generator_service.model.paged.reads import TILE_COLUMNS, TILE_ROWS, Reads, Visible

_BLOCK_SLOTS = 32
"""Slots a pass: one word of ancestry bits."""


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    out,
    tiles,
    pages,
    words,
    positions,
    slot_positions,
    bias,
    scale,
    query_stride,
    out_stride,
    slot_stride,
    num_words,
    num_distances,
    COLUMN: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    tile, head = tl.program_id(0), tl.program_id(1)
    at = tiles + tile * TILE_COLUMNS
    first, count = tl.load(at), tl.load(at + 1)
    if count == 0:
        return
    begin, length = tl.load(at + COLUMN), tl.load(at + COLUMN + 1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    real = row < count
    rows = (first + row).to(tl.int64)
    lane = head * HEAD_DIM + dim
    q = tl.load(query + rows[:, None] * query_stride + lane[None, :], mask=real[:, None], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for low in range(0, length, SLOTS):
        slot = low + tl.arange(0, SLOTS)
        there = slot < length
        page = tl.load(pages + begin + slot // PAGE_SLOTS, mask=there, other=0).to(tl.int64)
        where = page * PAGE_SLOTS + slot % PAGE_SLOTS
        address = where[:, None] * slot_stride + lane[None, :]
        k = tl.load(keys + address, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_BIAS:
            row_position = tl.load(positions + rows, mask=real, other=0)
            slot_position = tl.load(slot_positions + where, mask=there, other=0)
            distance = row_position[:, None] - slot_position[None, :]
            distance = tl.minimum(tl.maximum(distance, 0), num_distances - 1)
            scores += tl.load(bias + head * num_distances + distance)
        seen = there[None, :] & real[:, None]
        if HAS_WORDS:
            word = tl.load(words + rows * num_words + low // 32, mask=real, other=0)
            seen = seen & (((word[:, None] >> (slot % 32)[None, :]) & 1) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see nothing of the first pages
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(best - safe)
        v = tl.load(values + address, mask=there[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        best = higher
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + rows[:, None] * out_stride + lane[None, :], result.to(out.dtype.element_ty), mask=real[:, None]
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Reads,
    heads: int,
    *,
    scale: float,
    visible: Visible | None,
) -> Tensor:
    """As attend.attend, in one launch over tiles and heads."""
    assert query.stride(1) == keys.stride(1) == values.stride(1) == 1
    assert keys.stride(0) == values.stride(0)
    assert reads.tiles.shape[1] == TILE_COLUMNS
    assert reads.tiles.is_contiguous()
    out = query.new_zeros(query.shape)
    bias = None if visible is None else visible.bias
    unused: Any = reads.pages  # a kernel's argument must be something, even where a flag says it is not read
    _attend_kernel[(reads.tiles.shape[0], heads)](
        query,
        keys,
        values,
        out,
        reads.tiles,
        reads.pages,
        unused if visible is None else visible.words,
        unused if visible is None else visible.positions,
        unused if visible is None else visible.slot_positions,
        unused if bias is None else bias,
        scale,
        query.stride(0),
        out.stride(0),
        keys.stride(0),
        0 if visible is None else visible.words.stride(0),
        1 if bias is None else bias.shape[1],
        COLUMN=reads.column,
        TILE_COLUMNS=TILE_COLUMNS,
        PAGE_SLOTS=PAGE_SLOTS,
        ROWS=TILE_ROWS,
        SLOTS=_BLOCK_SLOTS,
        HEAD_DIM=query.shape[1] // heads,
        HAS_WORDS=visible is not None,
        HAS_BIAS=bias is not None,
    )
    return out
