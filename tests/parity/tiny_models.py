"""Tiny random RAG models whose answers depend on their history, so that ties do not decide between answers.

Plainly random weights repeat one token, and hypotheses that are permutations of one another then tie to the
last bits. Here residual branches are strengthened, attention is sharpened, and the direction that all decoder
states share is taken out of the output embeddings, but for the end token's: that is how often answers end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    MarianConfig,
    MarianMTModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RagConfig,
    RagTokenForGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from generator_service.model.backbone import Backbone
from generator_service.model.loader import as_backbone
from tests.parity.oracle import MathematicalRagSequence, RecordingRagSequence

VOCAB_SIZE = 61
FIRST_WORD = 4
"""Token ids below it have a special meaning in one family or another."""

_BART: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.12,  # larger ones magnify the rounding of float32
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "bos_token_id": None,  # RagSequence's get_nll reads it, and T5Config has none of its own
}
_WIDE_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
"""Heads wide enough for the attention of cpu_kernels; the other models' go through torch's."""
_BART_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


@dataclass(frozen=True)
class TinyRag:
    """One pair of question encoder and generator, in every class that answers with it."""

    generator: Any
    question_encoder: Any
    token: RagTokenForGeneration
    sequence: RecordingRagSequence
    mathematical: MathematicalRagSequence
    backbone: Backbone

    @property
    def pad_token_id(self) -> int:
        return int(self.generator.config.pad_token_id)

    @property
    def eos_token_id(self) -> int:
        return int(self.generator.config.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.generator.config, "bos_token_id", None)

    @property
    def decoder_start_token_id(self) -> int:
        return int(self.generator.config.decoder_start_token_id)

    def set_n_docs(self, n_docs: int) -> None:
        """RagSequence.generate scores with its config's n_docs alone."""
        for model in (self.token, self.sequence, self.mathematical):
            model.config.n_docs = n_docs


def _bart() -> Any:
    config = BartConfig(**_BART | _WIDE_HEADS, **_BART_IDS, decoder_start_token_id=2)
    return BartForConditionalGeneration(config)


def _bart_scaled() -> Any:
    config = BartConfig(**_BART, **_BART_IDS, decoder_start_token_id=0, scale_embedding=True)
    return BartForConditionalGeneration(config)


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(**_T5 | {"d_kv": 16}, pad_token_id=0))


def _t5_pad3() -> Any:
    return T5ForConditionalGeneration(T5Config(**_T5, pad_token_id=3))


def _t5_gated(pad_token_id: int = 3) -> Any:
    """T5 v1.1: gated, with a head of its own, whose inputs are not scaled."""
    config = T5Config(
        **_T5, pad_token_id=pad_token_id, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    return _untied(T5ForConditionalGeneration(config))


def _t5_gated_pad0() -> Any:
    return _t5_gated(pad_token_id=0)


def _mt5() -> Any:
    config = MT5Config(**_T5, pad_token_id=0, feed_forward_proj="gated-gelu")
    return _untied(MT5ForConditionalGeneration(config))


def _untied(model: Any) -> Any:
    """As checkpoints of T5 v1.1 and mT5 are loaded: T5Config itself insists on tied embeddings."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def _pegasus() -> Any:
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    return PegasusForConditionalGeneration(PegasusConfig(**_BART, **ids))


def _marian() -> Any:
    ids = {"pad_token_id": 3, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 3}
    config = MarianConfig(**_BART, **ids, decoder_vocab_size=VOCAB_SIZE)
    return MarianMTModel(config)


_FAMILIES = {
    "bart": _bart,
    "bart-scaled": _bart_scaled,
    "t5": _t5,
    "t5-pad3": _t5_pad3,
    "t5-gated": _t5_gated,
    "t5-gated-pad0": _t5_gated_pad0,
    "mt5": _mt5,
    "pegasus": _pegasus,
    "marian": _marian,
}


@functools.cache
def tiny_rag(family: str, seed: int = 0, decoder: str = "auto") -> TinyRag:
    """The model of a family and a seed; decoder as in as_backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = tiny_generator(family, seed)
        encoder_config = DPRConfig(
            pad_token_id=1,
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            projection_dim=0,
            initializer_range=0.5,
        )
        question_encoder = DPRQuestionEncoder(encoder_config).eval()
    config = RagConfig.from_question_encoder_generator_configs(encoder_config, generator.config, n_docs=1)
    parts = {"question_encoder": question_encoder, "generator": generator}
    return TinyRag(
        generator=generator,
        question_encoder=question_encoder,
        token=RagTokenForGeneration(config, **parts).eval(),
        sequence=RecordingRagSequence(config, **parts).eval(),
        mathematical=MathematicalRagSequence(config, **parts).eval(),
        backbone=as_backbone(generator, decoder),
    )


def tiny_generator(family: str, seed: int) -> Any:
    """The seq2seq model alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _FAMILIES[family]().eval()
        with torch.no_grad():
            if hasattr(model, "model"):
                _strengthen_bart_like(model)
            else:
                _strengthen_t5(model)
            _calibrate_head(model)
    return model


def _strengthen_bart_like(model: Any) -> None:
    for layer in model.model.decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            attention.q_proj.weight *= 3.0
            attention.out_proj.weight *= 3.0
        layer.fc1.weight *= 2.0
        layer.fc2.weight *= 4.0


def _strengthen_t5(model: Any) -> None:
    for block in model.decoder.block:
        for attention in (block.layer[0].SelfAttention, block.layer[1].EncDecAttention):
            attention.q.weight *= 4.0
            attention.o.weight *= 10.0
        for name, parameter in block.layer[2].named_parameters():
            if "wi" in name:
                parameter.mul_(3.0)
            elif "wo" in name:
                parameter.mul_(10.0)


_LOGITS_STD = 3.0
_PAD_BIAS = -4.0


def _calibrate_head(model: Any, rounds: int = 6) -> None:
    """Give logits a common spread, ends a fair chance, and pads hardly any."""
    config, head = model.config, model.lm_head.weight
    scaled = getattr(config, "scale_decoder_outputs", False)
    scale = float(config.d_model) ** 0.5 if scaled else 1.0
    end_bias = 1.6 if scaled else 0.8
    for _ in range(rounds):
        states, logits = _sample_states(model)
        mean = states.mean(0)
        direction = mean * scale * _LOGITS_STD / (mean @ mean)
        head -= torch.outer(head @ mean, mean) / (mean @ mean)
        head *= _LOGITS_STD / logits.std()
        head[config.eos_token_id] += direction * end_bias
        head[config.pad_token_id] += direction * _PAD_BIAS


def _sample_states(model: Any) -> tuple[Tensor, Tensor]:
    contexts = torch.randint(FIRST_WORD, VOCAB_SIZE, (16, 10))
    answers = torch.randint(FIRST_WORD, VOCAB_SIZE, (16, 10))
    answers[:, 0] = model.config.decoder_start_token_id
    outputs = model(
        input_ids=contexts,
        attention_mask=torch.ones_like(contexts),
        decoder_input_ids=answers,
        output_hidden_states=True,
    )
    return outputs.decoder_hidden_states[-1].flatten(0, 1), outputs.logits
