"""Any other seq2seq model, run by transformers: each row's whole history is decoded anew, slowly and surely."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from generator_service.model.backbone import RowBatch, RowBlock
from generator_service.model.kv_cache import ContextStates, SelfCache


class GeneralBackbone(nn.Module):
    """An AutoModelForSeq2SeqLM behind the backbone contract; its states are logits already."""

    name = "general"
    page_slots = 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = int(model.config.vocab_size)
        positions = getattr(model.config, "max_position_embeddings", None)
        self.max_positions: int | None = int(positions) if positions else None
        self.d_model = int(getattr(model.config, "d_model", None) or model.config.hidden_size)

    def encode(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        """As Backbone.encode."""
        encoder = self.model.get_encoder()
        states = []
        for context in contexts:
            ids = context[None]
            hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            states.append(ContextStates(int(context.shape[0]), None, None, hidden))
        return states

    def new_cache(self, num_contexts: int) -> SelfCache:
        """As Backbone.new_cache."""
        device, dtype = self.model.device, self.model.dtype
        return SelfCache(
            num_layers=0, num_contexts=num_contexts, heads=1, head_dim=1, dtype=dtype, device=device
        )

    def decode(self, batch: RowBatch) -> Tensor:
        """As Backbone.decode."""
        return torch.cat([self._decode_block(block) for block in batch.blocks])

    @contextlib.contextmanager
    def _showing_attention(self) -> Iterator[None]:
        """transformers' fused attention shows no weights: its plain one runs while they are wanted."""
        before = self.model.config._attn_implementation  # noqa: SLF001  (it has no public name)
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def logits(self, states: Tensor) -> Tensor:
        """As Backbone.logits."""
        return states

    def context_bytes(self, length: int) -> int:
        """As Backbone.context_bytes."""
        return length * self.d_model * int(self.model.dtype.itemsize)

    def slot_bytes(self) -> int:
        """As Backbone.slot_bytes."""
        return 16

    def _decode_block(self, block: RowBlock) -> Tensor:
        histories = self._histories(block)
        lengths = torch.tensor([len(h) for h in histories], device=self.model.device)
        ids = nn.utils.rnn.pad_sequence(histories, batch_first=True)  # pads come after: causal, never seen
        rows = torch.arange(len(histories), device=self.model.device)
        out = []
        scores = block.cross_attention
        for index, context in enumerate(block.contexts):
            assert context.hidden is not None
            hidden = context.hidden[None].expand(len(histories), -1, -1)
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            with self._showing_attention() if scores is not None else contextlib.nullcontext():
                outputs = self.model(
                    encoder_outputs=(hidden,),
                    attention_mask=mask,
                    decoder_input_ids=ids,
                    use_cache=False,
                    output_attentions=scores is not None,
                )
            out.append(outputs.logits[rows, lengths - 1])
            if scores is not None:
                for layer in outputs.cross_attentions:  # [rows, heads, positions, context length]
                    scores.add_weights(index, layer[rows, :, lengths - 1].float().mean(1))
        return torch.cat(out)

    @staticmethod
    def _histories(block: RowBlock) -> list[Tensor]:
        """Each row's tokens from the start: its ancestors' slots stand in the order of their positions."""
        tokens = block.cache.token_ids[: block.cache.num_slots]
        if block.ancestry is None:
            return [tokens]
        return [tokens[row] for row in block.ancestry]
