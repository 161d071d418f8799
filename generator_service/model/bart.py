"""BART, cut for RAG decoding (transformers models/bart/modeling_bart.py; Lewis et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from generator_service.model import attention, linears
from generator_service.model.backbone import AttentionBackbone, RowBatch
from generator_service.model.kv_cache import ContextStates


class _FeedForward(nn.Module):
    """Post-norm feed-forward block."""

    def __init__(self, layer: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = layer.fc1, layer.fc2, layer.final_layer_norm
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.norm(hidden + self.fc2(self.activation(self.fc1(hidden)))))


class _EncoderLayer(nn.Module):
    def __init__(self, layer: Any, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        own = layer.self_attn
        self.heads = heads
        self.qkv = attention.concatenated(own.q_proj, own.k_proj, own.v_proj)
        self.out, self.norm = own.out_proj, layer.self_attn_layer_norm
        self.feed_forward = _FeedForward(layer, activation)

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        attended = attention.encoder_attention(self.qkv(hidden), lengths, self.heads, scale=None, bias=None)
        return cast(Tensor, self.feed_forward(self.norm(hidden + self.out(attended))))


class _DecoderLayer(nn.Module):
    def __init__(self, layer: Any, index: int, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        own, cross = layer.self_attn, layer.encoder_attn
        self.index, self.heads = index, heads
        self.qkv = attention.concatenated(own.q_proj, own.k_proj, own.v_proj)
        self.out, self.norm = own.out_proj, layer.self_attn_layer_norm
        self.cross_query, self.cross_out = cross.q_proj, cross.out_proj
        self.cross_norm = layer.encoder_attn_layer_norm
        self.feed_forward = _FeedForward(layer, activation)

    def forward(self, hidden: Tensor, batch: RowBatch, masks: Sequence[Tensor | None]) -> Tensor:
        attended = attention.self_attention(
            self.qkv(hidden), batch, masks, self.index, self.heads, scale=None
        )
        hidden = self.norm(hidden + self.out(attended))
        attended = attention.cross_attention(
            self.cross_query(hidden), batch, self.index, self.heads, scale=None
        )
        hidden = self.cross_norm(hidden + self.cross_out(attended))
        return cast(Tensor, self.feed_forward(hidden))


class BartBackbone(AttentionBackbone):
    """transformers' BartForConditionalGeneration, whose weights it takes over."""

    name = "bart"

    def __init__(self, model: Any) -> None:
        super().__init__()
        config, inner = model.config, model.model
        activation = ACT2FN[config.activation_function]
        self.vocab_size = int(config.vocab_size)
        self.max_positions: int | None = int(config.max_position_embeddings)
        self.heads = int(config.decoder_attention_heads)
        self.num_layers = int(config.decoder_layers)
        self.head_dim = int(config.d_model) // self.heads
        self.scale = float(config.d_model) ** 0.5 if config.scale_embedding else 1.0
        self.offset = int(inner.encoder.embed_positions.offset)
        self.embedding = inner.shared.weight
        self.encoder_positions, self.encoder_norm = (
            inner.encoder.embed_positions.weight,
            inner.encoder.layernorm_embedding,
        )
        self.decoder_positions, self.decoder_norm = (
            inner.decoder.embed_positions.weight,
            inner.decoder.layernorm_embedding,
        )
        encoder_heads = int(config.encoder_attention_heads)
        self.encoder_layers = nn.ModuleList(
            _EncoderLayer(x, encoder_heads, activation) for x in inner.encoder.layers
        )
        self.decoder_layers = nn.ModuleList(
            _DecoderLayer(x, i, self.heads, activation) for i, x in enumerate(inner.decoder.layers)
        )
        projections = [
            p for x in inner.decoder.layers for p in (x.encoder_attn.k_proj, x.encoder_attn.v_proj)
        ]
        self.cross_projection = attention.concatenated(*projections)
        head = model.lm_head.weight
        self.head = linears.projection(head, model.final_logits_bias[0].to(head.dtype))

    def encode_together(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As AttentionBackbone.encode_together."""
        lengths = [int(c.shape[0]) for c in contexts]
        positions = torch.cat([self.encoder_positions[self.offset : self.offset + n] for n in lengths])
        hidden = self.encoder_norm(
            F.embedding(torch.cat(list(contexts)), self.embedding) * self.scale + positions
        )
        for layer in self.encoder_layers:
            hidden = layer(hidden, lengths)
        projected = attention.cross_states(
            self.cross_projection(hidden), lengths, self.num_layers, self.heads
        )
        return [ContextStates(n, *cross, None) for n, cross in zip(lengths, projected, strict=True)]

    def decode_together(self, batch: RowBatch) -> Tensor:
        """As AttentionBackbone.decode_together."""
        positions = F.embedding(batch.positions() + self.offset, self.decoder_positions)
        hidden = self.decoder_norm(F.embedding(batch.token_ids(), self.embedding) * self.scale + positions)
        masks = [attention.ancestry_mask(block.ancestry, hidden.dtype) for block in batch.blocks]
        for layer in self.decoder_layers:
            hidden = layer(hidden, batch, masks)
        return cast(Tensor, hidden)

    def logits(self, states: Tensor) -> Tensor:
        """As Backbone.logits."""
        return cast(Tensor, self.head(states))
