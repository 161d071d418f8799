"""Cross-attention weights of rows over their contexts, averaged over layers and heads: only where asked for."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_A_CHUNK = 128
"""Rows whose weights are held for every head at once."""


class CrossAttentionScores:
    """Takes up one layer after another; `of` then gives a context's mean weights float32 [rows, context length]."""

    def __init__(self, num_contexts: int) -> None:
        self._sums: list[Tensor | None] = [None] * num_contexts
        self._layers = [0] * num_contexts

    def add(self, context: int, query: Tensor, keys: Tensor, scale: float | None) -> None:
        """One layer's query [heads, rows, head_dim] over a context's keys [heads, length, head_dim]."""
        self.add_weights(context, mean_weights(query, keys, scale))

    def add_weights(self, context: int, weights: Tensor) -> None:
        """One layer's weights, averaged over its heads: [rows, length]."""
        before = self._sums[context]
        self._sums[context] = weights if before is None else before + weights
        self._layers[context] += 1

    def of(self, context: int) -> Tensor:
        """Mean weights of a context's rows; each row sums to one."""
        total = self._sums[context]
        assert total is not None, "the decoder has run"
        return total / self._layers[context]


def mean_weights(query: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """softmax(query · keys * scale), averaged over heads: float32 [rows, length].

    query [heads, rows, head_dim], keys [heads, length, head_dim]; scale None is 1 / sqrt(head_dim).
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    chunks = [
        torch.softmax((part @ keys.transpose(1, 2)).float() * factor, dim=-1).mean(0)
        for part in torch.split(query, _ROWS_A_CHUNK, dim=1)
    ]
    return torch.cat(chunks)
