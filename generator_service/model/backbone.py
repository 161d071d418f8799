"""What the model runner needs of a seq2seq model: the contract, and the rows it decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from generator_service.model.cross_attention_scores import CrossAttentionScores
from generator_service.model.kv_cache import ContextStates, SelfCache

_Item = TypeVar("_Item")


@dataclass
class RowBlock:
    """Rows that decode against the same contexts: the beams of a search, or the nodes of a candidate tree.

    Every context sees the same rows (RAG-Token: one beam, n_docs contexts). ancestry is bool [rows, slots] over the
    cache's slots with these rows appended; None where every row may attend to every slot. cross_attention, where it is
    set, takes up the rows' weights over their contexts.
    """

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    contexts: Sequence[ContextStates]
    cache: SelfCache
    ancestry: Tensor | None
    cross_attention: CrossAttentionScores | None = None

    @property
    def num_rows(self) -> int:
        """Decoder rows: contexts times rows."""
        return len(self.contexts) * int(self.token_ids.shape[0])


@dataclass
class RowBatch:
    """The blocks of one step, packed: block by block, within a block context by context, then row by row."""

    blocks: Sequence[RowBlock]

    def token_ids(self) -> Tensor:
        """int64 [total rows]."""
        return torch.cat([b.token_ids for b in self.blocks for _ in b.contexts])

    def positions(self) -> Tensor:
        """int64 [total rows]."""
        return torch.cat([b.positions for b in self.blocks for _ in b.contexts])

    def spans(self) -> Iterator[tuple[RowBlock, int, int]]:
        """Each block with its first row and one past its last."""
        start = 0
        for block in self.blocks:
            yield block, start, start + block.num_rows
            start += block.num_rows


class Backbone(Protocol):
    """A seq2seq model cut where RAG decoding needs it cut.

    The states that decode returns are opaque to the caller but for their first dimension; logits turns any selection
    of them into scores over the vocabulary. Rows never influence one another except through ancestry, so a
    block's states do not depend on the blocks beside it (up to float rounding).
    """

    name: str
    vocab_size: int
    max_positions: int | None
    """Longest context and answer that the position embeddings allow; None where there is no limit."""
    page_slots: int
    """Slots that a context or cache takes at a time: 1 where memory is not in pages."""

    def encode(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """Encode contexts, each int64 [length] with no pads, and project keys and values for all decoder layers."""

    def new_cache(self, num_contexts: int) -> SelfCache:
        """An empty self-attention cache for rows over num_contexts contexts."""

    def decode(self, batch: RowBatch) -> Tensor:
        """Run the decoder over rows already appended to their caches; returns states [total rows, …]."""

    def logits(self, states: Tensor) -> Tensor:
        """[rows, vocab_size] in the weights' dtype: what is made of them is made in float32."""

    def context_bytes(self, length: int) -> int:
        """Bytes that a context of this many tokens holds once encoded."""

    def slot_bytes(self) -> int:
        """Bytes that one decoded row of one context holds."""


_CPU_ROWS = 680
"""Rows that the CPU takes through the layers at a time: activations of many more leave its caches unread."""


class AttentionBackbone(nn.Module, ABC):
    """What our own decoders share: parts that fit the CPU's caches, caches of keys and values, and their sizes.

    Subclasses set the attributes and write encode_together and decode_together.
    """

    num_layers: int
    heads: int
    head_dim: int
    embedding: nn.Parameter
    page_slots: int = 1

    def encode(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As Backbone.encode."""
        parts = self._parts(contexts, [int(c.shape[0]) for c in contexts])
        return [states for part in parts for states in self.encode_together(part)]

    @abstractmethod
    def encode_together(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As Backbone.encode, of contexts that go through the layers at once."""

    def decode(self, batch: RowBatch) -> Tensor:
        """As Backbone.decode."""
        parts = list(self._parts(batch.blocks, [b.num_rows for b in batch.blocks]))
        if len(parts) == 1:
            return self.decode_together(batch)
        return torch.cat([self.decode_together(RowBatch(part)) for part in parts])

    @abstractmethod
    def decode_together(self, batch: RowBatch) -> Tensor:
        """As Backbone.decode, of rows that go through the layers at once."""

    def new_cache(self, num_contexts: int) -> SelfCache:
        """As Backbone.new_cache."""
        return SelfCache(
            num_layers=self.num_layers,
            num_contexts=num_contexts,
            heads=self.heads,
            head_dim=self.head_dim,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
        )

    def context_bytes(self, length: int) -> int:
        """As Backbone.context_bytes."""
        return length * self.slot_bytes()

    def slot_bytes(self) -> int:
        """As Backbone.slot_bytes: a key and a value in every layer."""
        return 2 * self.num_layers * self.heads * self.head_dim * int(self.embedding.element_size())

    def _parts(self, items: Sequence[_Item], rows: Sequence[int]) -> Iterator[Sequence[_Item]]:
        """Items in order, in parts of at most _CPU_ROWS rows, or of one item that has more; on a GPU all at once."""
        start = taken = 0
        if self.embedding.device.type == "cpu":
            for end, count in enumerate(rows):
                if end > start and taken + count > _CPU_ROWS:
                    yield items[start:end]
                    start, taken = end, 0
                taken += count
        yield items[start:]
