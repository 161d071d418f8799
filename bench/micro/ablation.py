"""What each idea of the engine gives: the engine without it beside the whole one: `make bench-ablation`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.load import report
from bench.machine import describe, num_cores
from bench.micro.engine import GRAPH_ROWS, Engine, seconds
from bench.micro.ideas import IDEAS, Idea
from bench.micro.workload import Questions, Shape, generator, questions
from generator_service.types import Compatibility, Strategy


@dataclass(frozen=True)
class Row:
    """Seconds for a batch with and without an idea; gain: how many times as long it takes without."""

    model: str
    device: str
    dtype: str
    strategy: str
    batch: int
    idea: str
    with_s: float
    without_s: float
    gain: float


def without(idea: Idea, model: Any, shape: Shape) -> Engine:
    """The engine without the idea; it is to be asked while idea.off() is entered, as it is made here."""
    with idea.off():
        return Engine(model, shape, graph_rows=GRAPH_ROWS if idea.graphs else 0, forced_tokens=True)


def measure(
    family: str,
    shape: Shape,
    batch: int,
    ideas: Sequence[Idea],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[Row]:
    """Each idea's two engines in turn, so that a machine that grows slower takes from both."""
    model = generator(family).to(device=device, dtype=dtype)
    whole = Engine(model, shape, forced_tokens=True)
    asked = questions(shape, batch, model.config.vocab_size, model.config.pad_token_id)
    small = questions(shape, 1, model.config.vocab_size, model.config.pad_token_id)
    for strategy in Strategy:
        whole.answer(small, strategy, Compatibility.MASKED)
    for idea in ideas:
        if device.type not in idea.devices:
            continue
        other = without(idea, model, shape)
        for strategy in idea.strategies:
            with idea.off():  # kernels are compiled, buffers taken
                other.answer(idea.questions(idea.asked(small)), strategy, Compatibility.MASKED)
            both, with_s, without_s = idea.asked(asked), float("inf"), float("inf")
            for _ in range(rounds):
                with_s = min(with_s, _once(whole, both, strategy))
                with idea.off():
                    without_s = min(without_s, _once(other, idea.questions(both), strategy))
            yield Row(
                family,
                str(device),
                str(dtype).removeprefix("torch."),
                strategy.value,
                len(both.doc_scores),
                idea.name,
                with_s,
                without_s,
                without_s / with_s,
            )


def _once(engine: Engine, asked: Questions, strategy: Strategy) -> float:
    return seconds(lambda: engine.answer(asked, strategy, Compatibility.MASKED), 1)


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 is one question in one round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one question, bart-base's widths, two layers")
    parser.add_argument("--model", choices=["bart-base-2", "bart-base", "bart-large", "t5-base"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument(
        "--ideas", nargs="+", metavar="WORDS", help="only those whose names hold one of these"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=num_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, on_cuda = arguments.device, arguments.device.type == "cuda"
    model = arguments.model or ("bart-base-2" if arguments.quick else "bart-base")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_cuda else "float32"))
    ideas = [i for i in IDEAS if any(words in i.name for words in arguments.ideas or [""])]
    rows = []
    for batch in arguments.batches or ([1] if arguments.quick else [1, 8]):
        for row in measure(
            model, Shape(), batch, ideas, device=device, dtype=dtype, rounds=1 if arguments.quick else 3
        ):
            rows.append(asdict(row))
            Console(stderr=True).print(f"{row.strategy} {row.batch} {row.idea}: {row.gain:.2f}")
            report.write(rows, arguments.json)  # now, as a long run may be cut off
    machine = torch.cuda.get_device_name(device) if on_cuda else describe(arguments.threads)
    report.show(machine, rows, Console(width=150))


if __name__ == "__main__":
    main()
