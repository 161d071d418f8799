"""The training loss: cross entropy on the answer, and two helpers that teach where to copy it from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartForConditionalGeneration

from demo.training.data.mixture import IGNORED, Batch

POINTER_WEIGHT = 0.5
GUIDE_WEIGHT = 0.25
MASKED = -1e4


@dataclass(frozen=True)
class Losses:
    """The parts of the loss, and how often the teacher-forced answer was right in every token."""

    answer: Tensor
    pointer: Tensor
    guide: Tensor
    exact: Tensor

    @property
    def total(self) -> Tensor:
        """Return the weighted sum that is minimised."""
        return self.answer + POINTER_WEIGHT * self.pointer + GUIDE_WEIGHT * self.guide


class Objective:
    """Computes Losses of a model on batches.

    pointer: a linear layer on the encoder that marks the answer's first and last token. It is used in
    training only. The last cross-attention is guided to the token that is to be copied next.
    """

    def __init__(self, model: BartForConditionalGeneration) -> None:
        self.model = model
        self.start = int(model.config.decoder_start_token_id or 0)
        self.pointer = nn.Linear(model.model.shared.embedding_dim, 2)
        attention = model.model.decoder.layers[-1].encoder_attn
        self.num_heads: int = attention.num_heads
        self.scaling: float = attention.scaling
        self.projected: dict[str, Tensor] = {}
        attention.q_proj.register_forward_hook(lambda _m, _i, output: self.projected.__setitem__("q", output))
        attention.k_proj.register_forward_hook(lambda _m, _i, output: self.projected.__setitem__("k", output))

    def __call__(self, batch: Batch) -> Losses:
        """Return the losses of one batch. The head is computed only where there is a label."""
        mask = batch.attention_mask
        output = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            decoder_input_ids=batch.decoder_input_ids(self.start),
            use_cache=False,
        )
        labelled = batch.labels != IGNORED  # [batch, T]
        logits = F.linear(
            output.last_hidden_state[labelled], self.model.model.shared.weight
        )  # [labels, vocab]
        answer = F.cross_entropy(logits, batch.labels[labelled])
        marks = self.pointer(output.encoder_last_hidden_state).masked_fill(mask[:, :, None] == 0, MASKED)
        pointer = (
            F.cross_entropy(marks[:, :, 0], batch.first) + F.cross_entropy(marks[:, :, 1], batch.last)
        ) / 2
        predicted = batch.labels.clone()
        predicted[labelled] = logits.detach().argmax(-1)
        exact = (predicted == batch.labels).all(1).float().mean()
        return Losses(answer, pointer, self.guide(batch, mask), exact)

    def guide(self, batch: Batch, mask: Tensor) -> Tensor:
        """Return how little the last cross-attention looks at the tokens to copy."""
        size, num_labels = batch.labels.shape
        queries = self.projected["q"].view(size, num_labels, self.num_heads, -1).transpose(1, 2)
        keys = self.projected["k"].view(size, mask.shape[1], self.num_heads, -1).transpose(1, 2)
        scores = (queries @ keys.transpose(2, 3)) * self.scaling  # [batch, heads, T, S]
        attention = scores.masked_fill(mask[:, None, None] == 0, MASKED).softmax(-1).mean(1)
        sources = batch.first[:, None] + torch.arange(num_labels)[None]  # [batch, T]
        inside = sources <= batch.last[:, None]
        looked = attention.gather(2, sources.clamp_max(mask.shape[1] - 1)[:, :, None])[:, :, 0]
        return -(looked + 1e-6).log()[inside].mean()
