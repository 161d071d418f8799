"""The workload of the engine's benchmark: random weights of real shapes, contexts as a retriever gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    RagConfig,
    T5Config,
    T5ForConditionalGeneration,
)

PADDED_LENGTH = 300
"""RagRetriever pads every context to max_combined_length."""

BART_SHAPES = {"bart-base-2": (2, 768, 12), "bart-base": (6, 768, 12), "bart-large": (12, 1024, 16)}
"""Layers, width, heads; bart-base-2 has two layers of bart-base."""


@dataclass(frozen=True)
class Shape:
    """A workload: n_docs contexts of context_length tokens a question, answers of answer_length tokens."""

    n_docs: int = 5
    context_length: int = 170
    num_beams: int = 4
    answer_length: int = 20


@dataclass(frozen=True)
class Questions:
    """Contexts of a batch as Hugging Face takes them: [batch * n_docs, PADDED_LENGTH], and their scores."""

    input_ids: Tensor
    attention_mask: Tensor
    doc_scores: Tensor


def generator(family: str) -> Any:
    """A seq2seq model with the shapes of t5-base or one of BART_SHAPES, and random weights."""
    torch.manual_seed(0)
    if family == "t5-base":
        # pad id 3: with 0, transformers' beam search fills short hypotheses with the end token (docs/parity.md)
        config = T5Config(
            vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, pad_token_id=3
        )
        config.decoder_start_token_id, config.bos_token_id = 0, None
        return T5ForConditionalGeneration(config).eval()
    layers, width, heads = BART_SHAPES[family]
    config = BartConfig(
        vocab_size=50265,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        init_std=0.05,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def rag(cls: type[Any], model: Any, n_docs: int) -> Any:
    """The Hugging Face class around the generator, with a question encoder that is never asked."""
    encoder = DPRQuestionEncoder(
        DPRConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    config = RagConfig.from_question_encoder_generator_configs(encoder.config, model.config, n_docs=n_docs)
    return cls(config, question_encoder=encoder, generator=model).eval()


def questions(shape: Shape, batch: int, vocab_size: int, pad_token_id: int) -> Questions:
    """Random contexts, each question's longest of them shape.context_length tokens."""
    random = torch.Generator().manual_seed(1)
    rows = batch * shape.n_docs
    ids = torch.randint(10, vocab_size, (rows, PADDED_LENGTH), generator=random)
    mask = torch.zeros_like(ids)
    mask[:, : shape.context_length] = 1
    ids = ids.masked_fill(mask == 0, pad_token_id)
    return Questions(ids, mask, torch.randn(batch, shape.n_docs, generator=random))
