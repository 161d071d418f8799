"""Generators of random weights in a folder that the service can serve."""

import shutil
from pathlib import Path

import torch
from transformers import BartConfig, BartForConditionalGeneration

from demo.settings import DEMO

SMALL, BART_BASE = "small", "bart-base"
SHAPES = {SMALL: (2, 2, 256, 4, 8192), BART_BASE: (6, 6, 768, 12, 30522)}
"""Encoder layers, decoder layers, width, heads, vocabulary. Steps of the small one are short enough for a queue on two
cores; its vocabulary is cut so that its head does not outweigh its layers."""


def save(model: str, folder: Path) -> BartConfig:
    """Saves a BART with the demo's tokenizer; its answers are as long as the question's limits make them."""
    encoder_layers, decoder_layers, width, heads, vocab_size = SHAPES[model]
    demo = DEMO / "checkpoint"
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=1024,
        init_std=0.05,
        bos_token_id=101,
        decoder_start_token_id=101,
        eos_token_id=102,
        forced_eos_token_id=102,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BartForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return config
