"""T5, T5 v1.1 and mT5, cut for RAG decoding (transformers models/t5/modeling_t5.py; Raffel et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator_service.model import attention, linears
from generator_service.model.backbone import AttentionBackbone, RowBatch
from generator_service.model.kv_cache import ContextStates


class RelativeBias(nn.Module):
    """T5's bucketed relative position bias, for any set of query and key positions."""

    def __init__(self, own: Any, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = own.relative_attention_bias.weight  # [buckets, heads]
        self.bidirectional = bidirectional
        self.num_buckets = int(own.relative_attention_num_buckets)
        self.max_distance = int(own.relative_attention_max_distance)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """int64 [rows] and [slots] -> [1, heads, rows, slots]."""
        buckets = self._bucket(key_positions[None, :] - query_positions[:, None])
        return F.embedding(buckets, self.weight).permute(2, 0, 1)[None]

    def _bucket(self, relative: Tensor) -> Tensor:
        buckets, num_buckets = torch.zeros_like(relative), self.num_buckets
        if self.bidirectional:
            num_buckets //= 2
            buckets = (relative > 0).long() * num_buckets
            distance = relative.abs()
        else:
            distance = (-relative).clamp_min(0)
        exact = num_buckets // 2
        ratio = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
        return buckets + torch.where(distance < exact, distance, far)


class _EncoderLayer(nn.Module):
    def __init__(self, block: Any, heads: int) -> None:
        super().__init__()
        own = block.layer[0].SelfAttention
        self.heads = heads
        self.qkv, self.out = attention.concatenated(own.q, own.k, own.v), own.o
        self.norm, self.feed_forward = block.layer[0].layer_norm, block.layer[-1]

    def forward(self, hidden: Tensor, lengths: Sequence[int], bias: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(hidden))
        hidden = hidden + self.out(
            attention.encoder_attention(qkv, lengths, self.heads, scale=1.0, bias=bias)
        )
        return cast(Tensor, self.feed_forward(hidden))


class _DecoderLayer(nn.Module):
    def __init__(self, block: Any, index: int, heads: int) -> None:
        super().__init__()
        own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        self.index, self.heads = index, heads
        self.qkv, self.out = attention.concatenated(own.q, own.k, own.v), own.o
        self.cross_query, self.cross_out = cross.q, cross.o
        self.norm, self.cross_norm = block.layer[0].layer_norm, block.layer[1].layer_norm
        self.feed_forward = block.layer[-1]

    def forward(self, hidden: Tensor, batch: RowBatch, masks: Sequence[Tensor | None]) -> Tensor:
        qkv = self.qkv(self.norm(hidden))
        hidden = hidden + self.out(
            attention.self_attention(qkv, batch, masks, self.index, self.heads, scale=1.0)
        )
        query = self.cross_query(self.cross_norm(hidden))
        hidden = hidden + self.cross_out(
            attention.cross_attention(query, batch, self.index, self.heads, scale=1.0)
        )
        return cast(Tensor, self.feed_forward(hidden))


class T5Backbone(AttentionBackbone):
    """transformers' T5ForConditionalGeneration or MT5ForConditionalGeneration, whose weights it takes over."""

    name = "t5"

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.vocab_size = int(config.vocab_size)
        self.max_positions: int | None = None
        self.heads, self.head_dim = int(config.num_heads), int(config.d_kv)
        self.num_layers = int(config.num_decoder_layers)
        self.embedding = model.shared.weight
        self.encoder_layers = nn.ModuleList(_EncoderLayer(b, self.heads) for b in model.encoder.block)
        self.encoder_norm = model.encoder.final_layer_norm
        self.encoder_bias = RelativeBias(model.encoder.block[0].layer[0].SelfAttention, bidirectional=True)
        self.decoder_layers = nn.ModuleList(
            _DecoderLayer(b, i, self.heads) for i, b in enumerate(model.decoder.block)
        )
        self.decoder_norm = model.decoder.final_layer_norm
        self.decoder_bias = RelativeBias(model.decoder.block[0].layer[0].SelfAttention, bidirectional=False)
        cross = [b.layer[1].EncDecAttention for b in model.decoder.block]
        self.cross_projection = attention.concatenated(*(p for x in cross for p in (x.k, x.v)))
        self.head = linears.projection(model.lm_head.weight, None)
        scaled = bool(getattr(config, "scale_decoder_outputs", False))  # mT5's decoder never scales
        self.output_scale = float(config.d_model) ** -0.5 if scaled else 1.0

    def encode_together(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As AttentionBackbone.encode_together."""
        lengths = [int(c.shape[0]) for c in contexts]
        positions = torch.arange(max(lengths), device=self.embedding.device)
        bias = self.encoder_bias(positions, positions).to(self.embedding.dtype).contiguous()
        hidden = F.embedding(torch.cat(list(contexts)), self.embedding)
        for layer in self.encoder_layers:
            hidden = layer(hidden, lengths, bias)
        projected = self.cross_projection(self.encoder_norm(hidden))
        states = attention.cross_states(projected, lengths, self.num_layers, self.heads)
        return [ContextStates(n, *cross, None) for n, cross in zip(lengths, states, strict=True)]

    def decode_together(self, batch: RowBatch) -> Tensor:
        """As AttentionBackbone.decode_together."""
        hidden = F.embedding(batch.token_ids(), self.embedding)
        masks = []
        for block in batch.blocks:
            bias = self.decoder_bias(block.positions, block.cache.positions[: block.cache.num_slots]).to(
                hidden.dtype
            )
            mask = attention.ancestry_mask(block.ancestry, hidden.dtype)
            masks.append((bias if mask is None else bias + mask).contiguous())
        for layer in self.decoder_layers:
            hidden = layer(hidden, batch, masks)
        return cast(Tensor, self.decoder_norm(hidden))

    def logits(self, states: Tensor) -> Tensor:
        """As Backbone.logits."""
        return cast(Tensor, self.head(states * self.output_scale))
