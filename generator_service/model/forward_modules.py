"""transformers' own modules, run for all that they can say: every hidden state and attention of a padded batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

_WORK_COPIES = 6
"""Activations of a layer's width that live at once while it runs."""
_SHIFTERS = {"bart", "mbart", "plbart", "led", "bigbird_pegasus"}


@dataclass(frozen=True)
class GeneratorInputs:
    """What the generator decodes against and what it decodes. A cache is appended to."""

    context_input_ids: Tensor | None
    encoder_last_hidden_state: Tensor | None
    context_attention_mask: Tensor | None
    decoder_input_ids: Tensor | None
    decoder_attention_mask: Tensor | None
    cache: Any | None


@dataclass(frozen=True)
class PassShape:
    """The sizes that the bytes of a pass follow from; past is what a cache holds already."""

    rows: int
    source: int
    target: int
    past: int = 0


class GeneratorModule:
    """The seq2seq model whose weights the backbone runs on too."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self.device: torch.device = model.device
        self.vocab_size = int(config.vocab_size)
        self.pad_token_id = int(config.pad_token_id)
        self.d_model = int(getattr(config, "d_model", None) or config.hidden_size)
        positions = getattr(config, "max_position_embeddings", None)
        self.max_positions: int | None = int(positions) if positions else None
        self._encoder_layers = _first(config, "encoder_layers", "num_layers", "num_hidden_layers")
        self._decoder_layers = _first(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers")
        self._encoder_heads = _first(config, "encoder_attention_heads", "num_heads", "num_attention_heads")
        self._decoder_heads = _first(config, "decoder_attention_heads", "num_heads", "num_attention_heads")
        inner = getattr(config, "d_kv", None)
        self._inner = int(inner) * self._decoder_heads if inner else self.d_model
        self._widest = max(self._inner * 3, _first(config, "encoder_ffn_dim", "d_ff", "intermediate_size"))
        self._itemsize = int(model.dtype.itemsize)

    def run(self, inputs: GeneratorInputs, *, attentions: bool, hidden_states: bool, use_cache: bool) -> Any:
        """transformers' Seq2SeqLMOutput. Attentions take its eager path: the fused ones have none to show."""
        hidden = inputs.encoder_last_hidden_state
        cache = inputs.cache
        if cache is None and use_cache:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with _eager(self._model, wanted=attentions):
            return self._model(
                input_ids=inputs.context_input_ids,
                attention_mask=inputs.context_attention_mask,
                encoder_outputs=None if hidden is None else (hidden.to(self._model.dtype),),
                decoder_input_ids=inputs.decoder_input_ids,
                decoder_attention_mask=inputs.decoder_attention_mask,
                past_key_values=cache,
                use_cache=use_cache or cache is not None,
                output_attentions=attentions,
                output_hidden_states=hidden_states,
                return_dict=True,
            )

    @property
    def makes_decoder_input_ids(self) -> bool:
        """Whether the model decodes its shifted input where no decoder_input_ids are given, as BART does."""
        return self._model.config.model_type in _SHIFTERS

    def output_bytes(self, name: str, shape: PassShape) -> int:
        """Bytes of one output, float32, all its layers."""
        rows, source, target = shape.rows, shape.source, shape.target
        match name:
            case "logits":
                count = rows * target * self.vocab_size
            case "generator_enc_last_hidden_state":
                count = rows * source * self.d_model
            case "generator_enc_hidden_states":
                count = (self._encoder_layers + 1) * rows * source * self.d_model
            case "generator_enc_attentions":
                count = self._encoder_layers * rows * self._encoder_heads * source * source
            case "generator_dec_hidden_states":
                count = (self._decoder_layers + 1) * rows * target * self.d_model
            case "generator_dec_attentions":
                count = self._decoder_layers * rows * self._decoder_heads * target * (shape.past + target)
            case "generator_cross_attentions":
                count = self._decoder_layers * rows * self._decoder_heads * target * source
            case _:
                count = 0
        return count * 4

    def working_bytes(self, shape: PassShape) -> int:
        """Bytes that the pass itself needs at its widest: a layer's activations, its scores, the logits."""
        longest = max(shape.source, shape.target)
        activations = shape.rows * (shape.source + shape.target) * self._widest * _WORK_COPIES
        heads = max(self._encoder_heads, self._decoder_heads)
        scores = 2 * shape.rows * heads * longest * (longest + shape.past)
        logits = 3 * shape.rows * shape.target * self.vocab_size
        return (activations + scores + logits) * 4

    def past_bytes(self, shape: PassShape) -> int:
        """Bytes of the keys and values, and of the encoder's states, that use_cache holds."""
        tokens = shape.source + shape.past + shape.target
        cached = 2 * self._decoder_layers * shape.rows * tokens * self._inner
        return (cached + shape.rows * shape.source * self.d_model) * self._itemsize


class QuestionModule:
    """The question encoder's module."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self._hidden, self._heads = int(config.hidden_size), int(config.num_attention_heads)
        self._layers = int(config.num_hidden_layers)
        self._widest = max(3 * self._hidden, int(getattr(config, "intermediate_size", 0) or 0))

    def run(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, attentions: bool, hidden_states: bool
    ) -> Any:
        """transformers' output; no mask is the module's own default."""
        with _eager(self.model, wanted=attentions):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_attentions=attentions,
                output_hidden_states=hidden_states,
                return_dict=True,
            )

    def output_bytes(self, name: str, batch: int, length: int) -> int:
        """Bytes of one output, float32, all its layers."""
        match name:
            case "question_enc_hidden_states":
                return 4 * (self._layers + 1) * batch * length * self._hidden
            case "question_enc_attentions":
                return 4 * self._layers * batch * self._heads * length * length
            case _:
                return 4 * batch * self._hidden

    def working_bytes(self, batch: int, length: int) -> int:
        """Bytes that the pass itself needs at its widest."""
        return 4 * batch * length * (self._widest * _WORK_COPIES + 2 * self._heads * length)


@contextmanager
def _eager(model: Any, *, wanted: bool) -> Iterator[None]:
    before = model.config._attn_implementation  # noqa: SLF001  (transformers has no other way to read it)
    if not wanted or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value:
            return int(value)
    raise ValueError(f"the generator's config has none of {', '.join(names)}")
