"""What serving costs: the service beside its engine called in this process: `make bench-served`."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.load import checkpoint, report
from bench.load.driver import Driver, connect
from bench.load.in_process import InProcess
from bench.load.latency import summarize
from bench.load.questions import Mix, Question, draw
from bench.load.services import flags_of_generator, generators
from bench.machine import describe, num_cores
from generator_service.types import Batching

CONCURRENCY = 32
_MIX = Mix(num_beams=(4,), answer_lengths=(20,), shares=(1.0,), context_length=(170, 170))
"""bench-engine's questions: alike but for the strategy, so that a short run tells."""


@dataclass(frozen=True)
class Row:
    """Questions a second at CONCURRENCY, and milliseconds of one alone, in this process and over the wire.

    Both sides are asked in turn. throughput_ratio is the median over rounds, added_p50_ms the median over questions, of
    what two neighbours in time differ by: a machine that grows slower meanwhile does so for both.
    """

    model: str
    rounds: int
    in_process_qps: float
    served_qps: float
    throughput_ratio: float
    in_process_p50_ms: float
    served_p50_ms: float
    added_p50_ms: float


class Bench:
    """Both sides of one model."""

    def __init__(self, driver: Driver, engine: InProcess, config: Any) -> None:
        self._driver, self._engine, self._config = driver, engine, config
        self._ids = 0

    async def throughput(self, questions: Sequence[Question], rounds: int) -> tuple[list[float], list[float]]:
        """Questions a second of each round, in process and served, in turn."""
        inside, served = [], []
        for _ in range(rounds):
            inside.append(len(questions) / self._inside(questions, CONCURRENCY))
            served.append(len(questions) / await self._served(questions, CONCURRENCY))
        return inside, served

    async def alone(self, questions: Sequence[Question]) -> tuple[list[float], list[float]]:
        """Seconds of each question asked alone, in process and served, in turn."""
        inside, served = [], []
        for question in questions:
            inside.append(self._inside([question], 1))
            served.append(await self._served([question], 1))
        return inside, served

    def _inside(self, questions: Sequence[Question], concurrency: int) -> float:
        works = [q.work(self._ids + index, self._config) for index, q in enumerate(questions)]
        self._ids += len(works)
        return self._engine.answer(works, concurrency)

    async def _served(self, questions: Sequence[Question], concurrency: int) -> float:
        outcomes, seconds = await self._driver.closed_loop([q.request() for q in questions], concurrency)
        if errors := summarize(outcomes).errors:
            raise RuntimeError(f"questions failed: {errors}")
        return seconds


async def measure(model: str, folder: Path, threads: int, counts: tuple[int, int, int]) -> Row:
    """counts are questions of a round, rounds, and questions asked alone."""
    many, rounds, lone = counts
    config = checkpoint.save(model, folder / "generator")
    engine = InProcess.of_generator(folder / "generator")
    flags = flags_of_generator(folder / "generator")
    questions = draw(_MIX, max(many, lone), config.vocab_size, seed=1)
    async with AsyncExitStack() as stack:
        addresses = stack.enter_context(generators(flags, [Batching.CONTINUOUS], folder / "logs", threads))
        driver = await stack.enter_async_context(connect(addresses[Batching.CONTINUOUS], timeout_s=600))
        bench = Bench(driver, engine, config)
        await bench.alone(questions[:3])  # warm up
        inside_qps, served_qps = map(np.array, await bench.throughput(questions[:many], rounds))
        inside_ms, served_ms = (np.array(s) * 1000 for s in await bench.alone(questions[:lone]))
    return Row(
        model,
        rounds,
        float(np.median(inside_qps)),
        float(np.median(served_qps)),
        float(np.median(served_qps / inside_qps)),
        float(np.median(inside_ms)),
        float(np.median(served_ms)),
        float(np.median(served_ms - inside_ms)),
    )


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 takes about two minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="fewer questions")
    parser.add_argument("--model", choices=sorted(checkpoint.SHAPES), default=checkpoint.SMALL)
    parser.add_argument("--threads", type=int, default=num_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    counts = (48, 4, 25) if arguments.quick else (96, 9, 101)
    with tempfile.TemporaryDirectory() as name:
        row = asyncio.run(measure(arguments.model, Path(name), arguments.threads, counts))
    found = [asdict(row)]
    report.show(describe(arguments.threads), found, console)
    report.write(found, arguments.json)


if __name__ == "__main__":
    main()
