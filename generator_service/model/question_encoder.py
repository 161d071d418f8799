"""Question encoders: DPR, and any AutoModel with a pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from generator_service.types import Pooling


class QuestionEncoder:
    """Questions -> question_hidden_states, as the retriever's index expects them.

    pooling FIRST_OUTPUT is what Hugging Face's RagModel does: the model's first output is the vector (DPR). normalize
    divides by the Euclidean norm; score_scale then multiplies, and so scales doc_scores: the softmax over cosines is
    nearly flat without it (docs/parity.md).
    """

    def __init__(self, model: Any, *, pooling: Pooling, normalize: bool, score_scale: float) -> None:
        self._model = model
        self._pooling, self._normalize, self._score_scale = pooling, normalize, score_scale
        config = model.config
        width = config.hidden_size
        if pooling is Pooling.FIRST_OUTPUT and getattr(config, "projection_dim", None):
            width = config.projection_dim
        self.dimension = int(width)
        self.vocab_size = int(config.vocab_size)
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 512)

    @torch.inference_mode()
    def encode(self, input_ids: Sequence[Sequence[int]], attention_mask: Sequence[Sequence[int]]) -> Tensor:
        """Questions of any lengths -> [batch, dim]; pads are masked, so company does not change a vector."""
        device = self._model.device
        rows = [torch.tensor(row, dtype=torch.int64) for row in input_ids]
        masks = [torch.tensor(row, dtype=torch.int64) for row in attention_mask]
        pad = int(getattr(self._model.config, "pad_token_id", None) or 0)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).to(device)
        return self.vectors(self._model(input_ids=ids, attention_mask=mask), mask)

    @property
    def module(self) -> Any:
        """transformers' own module."""
        return self._model

    def vectors(self, outputs: Any, mask: Tensor) -> Tensor:
        """The module's outputs -> [batch, dim], pooled, normalised and scaled."""
        hidden = self._pooled(outputs, mask)
        if self._normalize:
            hidden = F.normalize(hidden, dim=-1)
        return hidden * self._score_scale

    def _pooled(self, outputs: Any, mask: Tensor) -> Tensor:
        match self._pooling:
            case Pooling.FIRST_OUTPUT:
                return cast(Tensor, outputs[0]).float()
            case Pooling.POOLER:
                return cast(Tensor, outputs.pooler_output).float()
            case Pooling.CLS:
                return cast(Tensor, outputs.last_hidden_state)[:, 0].float()
            case Pooling.MEAN:
                states = cast(Tensor, outputs.last_hidden_state).float()
                weights = mask[:, :, None].float()
                return (states * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
