"""Train the demo generator on one CPU core: python -m demo.training.train --help."""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BartForConditionalGeneration, PreTrainedTokenizerBase

from demo.training.data.example import Example
from demo.training.data.mixture import Mixture
from demo.training.data.names import Names
from demo.training.data.passages import Passages
from demo.training.data.qamr import Qamr
from demo.training.data.synthetic import Synthesizer
from demo.training.objective import Losses, Objective

REPORT_EVERY = 50
WARMUP_STEPS = 40
FINAL_RATE = 0.03
MIX = (0.3, 0.37, 0.04, 0.29)
POINTER = "pointer.safetensors"
DEMO = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="checkpoint folder to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument(
        "--qamr", type=Path, required=True, help="a checkout of the QAMR data set (its filtered/ folder)"
    )
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument(
        "--decay-from", type=float, default=0.3, help="fraction of the time after which rates fall"
    )
    parser.add_argument("--mix", type=float, nargs=4, default=MIX, help="QAMR, synthetic, cloze, passages")
    parser.add_argument("--encoder-rate", type=float, default=1.5e-4)
    parser.add_argument("--decoder-rate", type=float, default=3e-4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=170)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def demo_questions() -> frozenset[str]:
    """Return the demo's own questions, which must not be trained on."""
    path = DEMO / "questions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return frozenset(json.loads(line)["question"].lower().rstrip("?") for line in lines)


def sources(
    options: argparse.Namespace, rng: random.Random, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[float, Callable[[], Example]]]:
    """Return the data sources with their weights."""
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    qamr = Qamr(rng, options.qamr)
    synthesizer = Synthesizer(rng, vocabulary)
    passages = Passages(
        rng, Names(rng, vocabulary), DEMO / "corpus.jsonl", Path(__file__).parent / "passages.jsonl"
    )
    return [
        (options.mix[0], lambda: qamr.example(rng.choice((0, 1, 2, 3)))),
        (options.mix[1], lambda: synthesizer.example(rng.choice((2, 4, 6)))),
        (options.mix[2], lambda: qamr.cloze(rng.choice((0, 1, 2, 3)))),
        (options.mix[3], passages.example),
    ]


def optimizer(objective: Objective, encoder_rate: float, decoder_rate: float) -> torch.optim.Optimizer:
    """Return AdamW over all weights but the word and position embeddings."""
    model = objective.model
    for embedding in (model.model.shared, model.model.encoder.embed_positions):
        embedding.weight.requires_grad_(False)
    encoder = [p for p in model.model.encoder.parameters() if p.requires_grad]
    known = {id(p) for p in encoder}
    decoder = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": encoder, "lr": encoder_rate, "peak": encoder_rate},
        {"params": decoder, "lr": decoder_rate, "peak": decoder_rate},
        {"params": objective.pointer.parameters(), "lr": 1e-3, "peak": 1e-3},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def rate(step: int, progress: float, decay_from: float) -> float:
    """Return the factor on the learning rates: a short rise, a plateau, then a line down."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    if progress < decay_from:
        return rise
    return rise * max(FINAL_RATE, 1 - (progress - decay_from) / (1 - decay_from))


def save(objective: Objective, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the model, its tokenizer and the pointer."""
    objective.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(objective.pointer.state_dict(), folder / POINTER)


def mean(losses: Iterable[Losses]) -> dict[str, float]:
    """Return the means of the parts."""
    rows = list(losses)
    parts = ("answer", "pointer", "guide", "exact")
    return {
        part: round(sum(float(getattr(row, part).detach()) for row in rows) / len(rows), 4) for part in parts
    }


def train(options: argparse.Namespace) -> None:
    """Train for the given minutes; save and report on the way."""
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.start)
    model = BartForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32)
    objective = Objective(model.train())
    if (options.start / POINTER).exists():
        objective.pointer.load_state_dict(load_file(options.start / POINTER))
    adam = optimizer(objective, options.encoder_rate, options.decoder_rate)
    weights: list[nn.Parameter] = [p for group in adam.param_groups for p in group["params"]]
    mixture = Mixture(rng, tokenizer, sources(options, rng, tokenizer), options.max_length, demo_questions())
    options.output.mkdir(parents=True, exist_ok=True)
    began, step, num_tokens, recent = time.monotonic(), 0, 0, []
    with (options.output / "log.jsonl").open("a", encoding="utf-8") as log:
        while (progress := (time.monotonic() - began) / (60 * options.minutes)) < 1:
            for group in adam.param_groups:
                group["lr"] = group["peak"] * rate(step, progress, options.decay_from)
            batch = mixture.batch(options.batch_tokens)
            losses = objective(batch)
            losses.total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            adam.zero_grad()
            step += 1
            num_tokens += batch.input_ids.numel()
            recent.append(losses)
            if step % REPORT_EVERY == 0:
                seconds = time.monotonic() - began
                line = {"step": step, "s": round(seconds), "tokens": num_tokens, **mean(recent)}
                print(json.dumps(line), file=log, flush=True)
                recent.clear()
            if step % (2 * REPORT_EVERY) == 0:
                save(objective, tokenizer, options.output / "latest")
    save(objective, tokenizer, options.output / "latest")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(arguments())
