"""The rows of a step as tensors over the arena: which slots each writes, and which pages it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from generator_service.model.backbone import RowBatch
from generator_service.model.cross_attention_scores import CrossAttentionScores
from generator_service.model.paged import attend
from generator_service.model.paged.arena import PAGE_SLOTS, Arena, PagedCache, PagedStates
from generator_service.model.paged.reads import CROSS, SELF, TILE_COLUMNS, TILE_ROWS, Reads, Visible
from generator_service.transfers import to_device

WORD_BITS = 32


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch stand in the arena: plain numbers, laid out before anything goes to the device.

    A tile is up to TILE_ROWS rows of one context; the attention kernel reads its keys once for all of them.
    """

    slots: list[int]  # [rows]: where each row's key and value are written
    tiles: list[int]  # [tiles * TILE_COLUMNS]: see attend
    pages: list[int]  # page numbers of every context and cache of the batch, one after the other
    ancestry: list[
        tuple[int, int]
    ]  # [rows]: where its bits begin among all the batch's, and how many there are
    longest: tuple[int, int]  # slots of the longest context, and of the longest cache

    @classmethod
    def of(cls, batch: RowBatch) -> Layout:
        """Of blocks whose contexts and caches are in the arena."""
        slots: list[int] = []
        tiles: list[int] = []
        pages: list[int] = []
        ancestry: list[tuple[int, int]] = []
        longest_context, longest_cache, bits = 1, 1, 0
        for block in batch.blocks:
            rows, cache = int(block.token_ids.shape[0]), cast(PagedCache, block.cache)
            first_slot = cache.num_slots - rows
            width = 0 if block.ancestry is None else cache.num_slots
            longest_cache = max(longest_cache, cache.num_slots)
            for context, own in zip(cast(Sequence[PagedStates], block.contexts), cache.pages, strict=True):
                reads = [len(pages), context.length, len(pages) + len(context.pages), cache.num_slots]
                start = len(slots)
                pages += context.pages
                pages += own
                longest_context = max(longest_context, context.length)
                for low in range(0, rows, TILE_ROWS):
                    tiles += [start + low, min(TILE_ROWS, rows - low), *reads]
                for row in range(rows):
                    page, within = divmod(first_slot + row, PAGE_SLOTS)
                    slots.append(own[page] * PAGE_SLOTS + within)
                    ancestry.append((bits + row * width, width))
            bits += rows * width
        return cls(slots, tiles, pages, ancestry, (longest_context, longest_cache))

    @property
    def num_rows(self) -> int:
        """Decoder rows of the batch."""
        return len(self.slots)

    @property
    def num_tiles(self) -> int:
        """Tiles of the batch, never more than rows."""
        return len(self.tiles) // TILE_COLUMNS

    @property
    def num_words(self) -> int:
        """32-bit words of the longest ancestry."""
        return -(-self.longest[1] // WORD_BITS)


@dataclass(frozen=True)
class Traced:
    """Rows of one context whose cross-attention weights are wanted."""

    scores: CrossAttentionScores
    context: int
    first: int
    count: int
    slots: Tensor  # int64 [context length]


@dataclass
class PagedRows(RowBatch):
    """What the decoder layers take for a RowBatch when keys and values are in the arena.

    It has no blocks: the layers' attention goes through self_attention and cross_attention here.
    """

    arena: Arena
    tokens: Tensor  # int64 [rows]
    token_positions: Tensor  # int64 [rows]
    slots: Tensor  # int32 [rows]
    tiles: Tensor  # int32 [tiles, TILE_COLUMNS]; a tile of no rows is skipped
    pages: Tensor  # int32 [pages]
    words: Tensor  # int32 [rows, words]: bit s of a row: it attends to slot s of its cache
    longest: tuple[int, int]
    bias: Tensor | None = None  # float32 [heads, distances]: T5's, by distance; the last is for all beyond
    traced: Sequence[Traced] = ()

    def token_ids(self) -> Tensor:
        """As RowBatch.token_ids."""
        return self.tokens

    def positions(self) -> Tensor:
        """As RowBatch.positions."""
        return self.token_positions

    def begin(self) -> None:
        """What the layers share: the rows' positions, where later rows find them."""
        self._slots = self.slots.long()
        self.arena.positions.index_copy_(0, self._slots, self.token_positions.int())

    def self_attention(self, qkv: Tensor, layer: int, heads: int, *, scale: float | None) -> Tensor:
        """As attention.self_attention: qkv [rows, 3 * inner] -> [rows, inner]."""
        query, key, value = qkv.chunk(3, dim=-1)
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)
        visible = Visible(self.words, self.token_positions, self.arena.positions, self.bias)
        reads = Reads(self.tiles, SELF, self.pages, self.longest[1])
        return attend.attend(query, keys, values, reads, heads, scale=scale, visible=visible)

    def cross_attention(self, query: Tensor, layer: int, heads: int, *, scale: float | None) -> Tensor:
        """As attention.cross_attention: query [rows, inner] -> [rows, inner]."""
        reads = Reads(self.tiles, CROSS, self.pages, self.longest[0])
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        for wanted in self.traced:
            part = query[wanted.first : wanted.first + wanted.count].view(wanted.count, heads, -1)
            own = keys[wanted.slots].view(len(wanted.slots), heads, -1)
            wanted.scores.add(wanted.context, part.transpose(0, 1), own.transpose(0, 1), scale)
        return attend.attend(query, keys, values, reads, heads, scale=scale, visible=None)


def traced_rows(batch: RowBatch, arena: Arena) -> list[Traced]:
    """Those of the blocks whose attention is wanted."""
    found = []
    for block, start, _ in batch.spans():
        if block.cross_attention is None:
            continue
        rows = int(block.token_ids.shape[0])
        for index, context in enumerate(cast(Sequence[PagedStates], block.contexts)):
            slots = arena.slots(context.pages, context.length)
            found.append(Traced(block.cross_attention, index, start + index * rows, rows, slots))
    return found


def ancestry_words(batch: RowBatch, layout: Layout, device: torch.device) -> Tensor:
    """The blocks' ancestry as bits: int32 [rows, words]; all ones for a row that may attend to every slot."""
    tables = [b.ancestry.flatten() for b in batch.blocks if b.ancestry is not None]
    shape = (layout.num_rows, layout.num_words)
    if not tables:
        return torch.full(shape, -1, dtype=torch.int32, device=device)
    flat = torch.cat(tables)
    where = to_device(layout.ancestry, torch.int64, device)
    columns = torch.arange(layout.num_words * WORD_BITS, device=device)
    seen = flat[(where[:, :1] + columns).clamp_max(flat.shape[0] - 1)] | (columns >= where[:, 1:])
    weights = torch.ones((), dtype=torch.int64, device=device) << torch.arange(WORD_BITS, device=device)
    return (seen.view(*shape, WORD_BITS) * weights).sum(-1).to(torch.int32)
