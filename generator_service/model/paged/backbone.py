"""Our decoders over the arena: the same weights and layers, with keys and values at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generator_service.model.backbone import Backbone, RowBatch
from generator_service.model.bart import BartBackbone
from generator_service.model.kv_cache import ContextStates
from generator_service.model.paged.arena import PAGE_SLOTS, Arena, PagedCache
from generator_service.model.paged.captured_step import CapturedStep, run_eagerly
from generator_service.model.paged.rows import Layout
from generator_service.model.t5 import T5Backbone


class PagedBackbone:
    """A Backbone around one of ours. encode and decode raise ArenaFullError where the budget is used up.

    max_rows: rows of the largest step that gets a CUDA graph; 0 runs every step without one.
    """

    def __init__(self, own: BartBackbone | T5Backbone, *, budget_bytes: int, max_rows: int) -> None:
        self.own, self.name = own, own.name
        self.vocab_size, self.max_positions = own.vocab_size, own.max_positions
        self.page_slots = PAGE_SLOTS
        self.arena = Arena(
            num_layers=own.num_layers,
            inner=own.heads * own.head_dim,
            num_pages=max(1, budget_bytes // (PAGE_SLOTS * own.slot_bytes())),
            dtype=own.embedding.dtype,
            device=own.embedding.device,
        )
        self._bias = _bias_by_distance(own) if isinstance(own, T5Backbone) else None
        self._steps: CapturedStep | None = None
        if max_rows:
            width = int(own.embedding.shape[1])
            self._steps = CapturedStep(
                own.decode, self.arena, max_rows=max_rows, width=width, bias=self._bias
            )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the graphs; does nothing but on CUDA."""
        if self._steps is not None and self.arena.keys.device.type == "cuda":
            self._steps.capture()

    def encode(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As Backbone.encode."""
        return [self.arena.store(states) for states in self.own.encode(contexts)]

    def new_cache(self, num_contexts: int) -> PagedCache:
        """As Backbone.new_cache."""
        return PagedCache(self.arena, num_contexts)

    def decode(self, batch: RowBatch) -> Tensor:
        """As Backbone.decode; the states hold until the next call."""
        layout = Layout.of(batch)
        traced = any(block.cross_attention is not None for block in batch.blocks)
        if self._steps is not None and not traced and self._steps.fits(layout):
            return self._steps.run(batch, layout)
        return run_eagerly(self.own.decode, self.arena, batch, layout, self._bias)

    def logits(self, states: Tensor) -> Tensor:
        """As Backbone.logits."""
        return self.own.logits(states)

    def context_bytes(self, length: int) -> int:
        """As Backbone.context_bytes, pages not counted: see page_slots."""
        return self.own.context_bytes(length)

    def slot_bytes(self) -> int:
        """As Backbone.slot_bytes."""
        return self.own.slot_bytes()


def paged(backbone: Backbone, *, budget_bytes: int, max_rows: int) -> Backbone:
    """The backbone over an arena of budget_bytes, if it is one of ours; the general one stays as it is."""
    if isinstance(backbone, BartBackbone | T5Backbone):
        return PagedBackbone(backbone, budget_bytes=budget_bytes, max_rows=max_rows)
    return backbone


def _bias_by_distance(own: T5Backbone) -> Tensor:
    """float32 [heads, distances]: the decoder looks back only, and from max_distance on the bias is one."""
    device = own.embedding.device
    distances = torch.arange(own.decoder_bias.max_distance + 1, device=device)
    with torch.inference_mode():
        bias: Tensor = own.decoder_bias(distances, torch.zeros(1, dtype=torch.int64, device=device))
    return bias[0, :, :, 0].float().contiguous()
