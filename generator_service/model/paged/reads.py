"""What a step's rows read of the arena, tile by tile: as the kernels and torch's attention both take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TILE_ROWS = 16
"""Rows that read a context's keys together: the fewest that a tensor core's product takes."""
TILE_COLUMNS = 6
"""Of a tile: first row, rows, then for CROSS and for SELF each: where its pages begin, and how many slots."""
CROSS, SELF = 2, 4


@dataclass(frozen=True)
class Reads:
    """Which slots each tile of rows attends to."""

    tiles: Tensor  # int32 [tiles, TILE_COLUMNS]
    column: int  # CROSS or SELF
    pages: Tensor  # int32 [pages]
    longest: int  # slots of the longest; only torch's attention needs it


@dataclass(frozen=True)
class Visible:
    """Self-attention's own: who sees whom, and T5's bias by distance."""

    words: Tensor  # int32 [rows, words]
    positions: Tensor  # int64 [rows]
    slot_positions: Tensor  # int32 [slots]
    bias: Tensor | None  # float32 [heads, distances]
