"""On a CUDA device: bart-large in bf16 against Hugging Face and against the card's floor: `make bench-gpu`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from bench.load import report
from bench.micro.engine import GRAPH_ROWS, Engine, hugging_face, seconds
from bench.micro.workload import Shape, generator, questions
from generator_service.types import Compatibility, Strategy

MODEL = "bart-large"

FLOOR_MS = {
    Strategy.RAG_TOKEN: {1: 3.8, 8: 1.1, 32: 0.8, 64: 0.8},
    Strategy.RAG_SEQUENCE: {1: 4.6, 8: 2.3, 32: 2.0, 64: 1.9},
}
"""Milliseconds a question on one H100, by batch, for Shape() and MODEL in bf16: derived in docs/benchmarks.md.

RAG-Sequence's counts a row for every token of every candidate.
"""
TREE_FLOOR_MS = {32: 1.1}
"""RAG-Sequence's where candidates share a prefix tree of a quarter of the rows."""


@dataclass(frozen=True)
class Row:
    """Questions a second of both sides; fractions are of what FLOOR_MS and TREE_FLOOR_MS allow, None off an H100."""

    model: str
    strategy: str
    device: str
    dtype: str
    batch: int
    ours_qps: float
    hf_qps: float
    ratio: float
    floor_fraction: float | None
    tree_floor_fraction: float | None


def fraction(qps: float, floor_ms: float | None) -> float | None:
    """What part of the most questions a second that the floor allows; None where there is no floor."""
    return None if floor_ms is None else qps * floor_ms / 1000


def measure(batches: Sequence[int], device: torch.device, *, graph_rows: int, repeat: int) -> Iterator[Row]:
    """Both sides on the same questions, device and dtype, one after the other."""
    model, shape, name = (
        generator(MODEL).to(device, torch.bfloat16),
        Shape(),
        torch.cuda.get_device_name(device),
    )
    engine = Engine(model, shape, graph_rows=graph_rows)
    has_floor = "H100" in name
    for strategy in Strategy:
        other = hugging_face(model, shape, strategy)
        for batch in batches:
            asked = questions(shape, batch, model.config.vocab_size, model.config.pad_token_id)
            ours = partial(engine.answer, asked, strategy, Compatibility.MASKED)
            seconds(ours, 1)  # compiles the kernels of these shapes
            ours_qps, hf_qps = batch / seconds(ours, repeat), batch / seconds(partial(other, asked), repeat)
            tree = TREE_FLOOR_MS.get(batch) if strategy is Strategy.RAG_SEQUENCE else None
            yield Row(
                MODEL,
                strategy.value,
                name,
                "bfloat16",
                batch,
                ours_qps,
                hf_qps,
                ours_qps / hf_qps,
                fraction(ours_qps, FLOOR_MS[strategy].get(batch) if has_floor else None),
                fraction(ours_qps, tree if has_floor else None),
            )


def main() -> None:
    """Print the table; with JSON=file write its rows. Exits 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="batches of 1 and 32, one run each")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--graph-rows", type=int, default=GRAPH_ROWS, help="0: without CUDA graphs")
    arguments = parser.parse_args()
    if arguments.device.type != "cuda" or not torch.cuda.is_available():
        print(f"no CUDA device ({arguments.device}): bench-gpu measures nothing elsewhere", file=sys.stderr)
        raise SystemExit(2)
    transformers_logging.set_verbosity_error()
    batches = arguments.batches or ([1, 32] if arguments.quick else [1, 8, 32, 64])
    rows = []
    for row in measure(
        batches, arguments.device, graph_rows=arguments.graph_rows, repeat=1 if arguments.quick else 3
    ):
        rows.append(asdict(row))
        Console(stderr=True).print(f"{row.strategy} {row.batch}: {row.ours_qps:.3g}/s, {row.ratio:.3g}")
    report.show(f"torch {torch.__version__}", rows, Console(width=150))
    report.write(rows, arguments.json)


if __name__ == "__main__":
    main()
