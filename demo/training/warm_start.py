"""Build the untrained generator: a BART whose layers are MiniLM's: python -m demo.training.warm_start --help.

Both architectures normalise after each block and use GELU, so MiniLM's six layers become BART's encoder as
they are (its states differ from MiniLM's by about 1e-3), and two of them the decoder. MiniLM has no
cross-attention: the last one is started by ridge regression so that it copies tokens of the source.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, BertModel

from demo.assemble import ENCODER_DIR
from demo.training.data.example import encode
from demo.training.data.mixture import Batch, collate
from demo.training.data.qamr import Qamr

DECODER_LAYERS = (1, 5)
"""The MiniLM layers that the decoder's layers start from."""

PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
NUM_BATCHES, BATCH_SIZE = 12, 16
RIDGE = 3.0
QUERY_GAIN = 1.3
OUTPUT_GAIN = 6.0
NORM_GAIN = 1.7


def bart_config(bert: BertModel) -> BartConfig:
    """Return the configuration of a BART with MiniLM's sizes and special tokens."""
    config = bert.config
    return BartConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        encoder_layers=config.num_hidden_layers,
        decoder_layers=len(DECODER_LAYERS),
        encoder_attention_heads=config.num_attention_heads,
        decoder_attention_heads=config.num_attention_heads,
        encoder_ffn_dim=config.intermediate_size,
        decoder_ffn_dim=config.intermediate_size,
        activation_function="gelu",
        dropout=0.1,
        scale_embedding=False,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
        decoder_start_token_id=101,
        forced_eos_token_id=102,
    )


@torch.no_grad()
def copy_layers(bert: BertModel) -> BartForConditionalGeneration:
    """Return a BART with MiniLM's embeddings and layers."""
    model = BartForConditionalGeneration(bart_config(bert))
    model.train(False)
    embeddings = bert.embeddings
    model.model.shared.weight.copy_(embeddings.word_embeddings.weight)
    positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    for side in (model.model.encoder, model.model.decoder):
        side.embed_positions.weight[:2].zero_()
        side.embed_positions.weight[2:].copy_(positions)
        side.layernorm_embedding.load_state_dict(embeddings.LayerNorm.state_dict())
    pairs = list(zip(model.model.encoder.layers, bert.encoder.layer, strict=True))
    pairs += [(model.model.decoder.layers[i], bert.encoder.layer[j]) for i, j in enumerate(DECODER_LAYERS)]
    for layer, source in pairs:
        for part, name in PARTS.items():
            layer.get_submodule(part).load_state_dict(source.get_submodule(name).state_dict())
    return model


def ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the linear map from inputs to targets by ridge regression."""
    center, target = inputs.mean(0), targets.mean(0)
    moved = inputs - center
    gram = moved.T @ moved + RIDGE * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(gram, moved.T @ (targets - target))
    return weight.T.contiguous(), target - center @ weight


@torch.no_grad()
def observe(model: BartForConditionalGeneration, batches: list[Batch]) -> dict[str, Tensor]:
    """Run the batches and collect encoder states, decoder queries, and the embeddings they stand for."""
    table = model.model.shared.weight
    attention = model.model.decoder.layers[-1].encoder_attn
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("state", "token", "previous", "query", "query_token")
    }
    seen: dict[str, Tensor] = {}
    hook = attention.q_proj.register_forward_hook(
        lambda _module, inputs, _output: seen.__setitem__("query", inputs[0])
    )
    for batch in batches:
        ids, mask = batch.input_ids, batch.attention_mask
        states = model.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        decoder_ids = ids[:, 5:17].clone()
        decoder_ids[:, 0] = 101
        model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=decoder_ids)
        inner = mask.bool()
        inner[:, 0] = False
        rows["state"].append(states[inner])
        rows["token"].append(table[ids[inner]])
        rows["previous"].append(table[torch.roll(ids, 1, 1)[inner]])
        rows["query"].append(seen["query"][decoder_ids != 0])
        rows["query_token"].append(table[decoder_ids[decoder_ids != 0]])
    hook.remove()
    return {name: torch.cat(values) for name, values in rows.items()}


@torch.no_grad()
def start_copying(model: BartForConditionalGeneration, batches: list[Batch]) -> None:
    """Start the last cross-attention so that it looks for the token after the one just written and copies it."""
    first, last = (layer.encoder_attn for layer in model.model.decoder.layers)
    nn.init.normal_(first.out_proj.weight, std=0.005)
    for attention in (first, last):
        nn.init.normal_(attention.q_proj.weight, std=0.05)
        nn.init.normal_(attention.k_proj.weight, std=0.05)
    rows = observe(model, batches)
    size = model.model.shared.embedding_dim
    mean = rows["token"].mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((rows["token"] - mean).T) + 1e-4 * torch.eye(size))
    whiten = vectors @ torch.diag(values.clamp_min(1e-3).rsqrt()) @ vectors.T
    copied, copied_bias = ridge(rows["state"], rows["token"] - mean)
    key, key_bias = ridge(rows["state"], (rows["previous"] - mean) @ whiten)
    query, query_bias = ridge(rows["query"], (rows["query_token"] - mean) @ whiten)
    turn = torch.linalg.qr(torch.randn(size, size))[0]  # spreads the match over all heads
    spread = torch.linalg.qr(torch.randn(size, size))[0]
    settings: list[tuple[Any, Tensor, Tensor]] = [
        (last.q_proj, turn @ query * QUERY_GAIN, turn @ query_bias * QUERY_GAIN),
        (last.k_proj, turn @ key, turn @ key_bias),
        (last.v_proj, spread @ copied, spread @ copied_bias),
        (last.out_proj, spread.T * OUTPUT_GAIN, torch.zeros(size)),
    ]
    for layer, weight, bias in settings:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    model.model.decoder.layers[-1].final_layer_norm.weight.mul_(NORM_GAIN)


def main() -> None:
    """Write the untrained generator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qamr", type=Path, required=True, help="a checkout of the QAMR data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ENCODER_DIR)
    qamr = Qamr(random.Random(3), options.qamr)
    drawn = (encode(tokenizer, qamr.cloze(2), 240) for _ in range(NUM_BATCHES * BATCH_SIZE))
    examples = [tokens for tokens in drawn if tokens is not None]
    batches = [collate(examples[i : i + BATCH_SIZE], 102) for i in range(0, len(examples), BATCH_SIZE)]
    bert = BertModel.from_pretrained(ENCODER_DIR, add_pooling_layer=False)
    model = copy_layers(bert)
    start_copying(model, batches)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
