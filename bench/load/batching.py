"""Latency under open-loop load, continuous batching beside gather-then-run batching of one engine: `make load`."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.load import checkpoint, report
from bench.load.arrivals import poisson
from bench.load.driver import Driver, connect
from bench.load.latency import Outcome, summarize
from bench.load.questions import Mix, draw
from bench.load.services import demo_retriever, flags_of_generator, generators
from bench.machine import describe, num_cores
from demo.settings import DEMO
from generator_service.types import Batching, Strategy
from rag_client import messages

LOADS = (0.5, 0.7)
CONCURRENCY = 32
_CAPACITY_SEED, _ARRIVAL_SEED = 1, 100

SHORT = 12
"""Tokens of what counts as a short answer."""


@dataclass(frozen=True)
class Ask:
    """A request, serialised, and the tokens of its answer where they are known beforehand."""

    request: bytes
    answer_length: int | None = None


MakeAsks = Callable[[int, int], list[Ask]]
"""From a count and a seed to that many requests."""


@dataclass(frozen=True)
class Plan:
    """How much is asked: questions to measure capacity with, and seconds of arrivals at each load."""

    capacity_questions: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One policy at one load; ratios are continuous to gather-then-run, on the row of CONTINUOUS.

    short_p99_ms is of the questions with answers of at most SHORT tokens: nan where lengths are not known.
    """

    workload: str
    batching: str
    load: float
    rate: float
    capacity: float
    sent: int
    answered: int
    errors: dict[str, int]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    short_p99_ms: float
    mean_ms: float
    p50_ratio: float | None
    p99_ratio: float | None
    short_p99_ratio: float | None
    max_send_lag_ms: float
    driver_cpu: float


async def measure(
    addresses: dict[Batching, str], make: MakeAsks, plan: Plan, workload: str, console: Console
) -> list[Row]:
    """Capacity of both, then both at shares of continuous batching's; both at once, at the same moments.

    Addresses are CONTINUOUS's and a gathering policy's.
    """
    async with AsyncExitStack() as stack:
        drivers = {
            policy: await stack.enter_async_context(connect(address)) for policy, address in addresses.items()
        }
        await _capacity(drivers, _requests(make(min(CONCURRENCY, plan.capacity_questions), 0)))  # warm up
        capacity = await _capacity(drivers, _requests(make(plan.capacity_questions, _CAPACITY_SEED)))
        for policy, qps in capacity.items():
            console.print(f"{policy.value}: {qps:.2f} questions/s at {CONCURRENCY} concurrent")
        rows = []
        for load in LOADS:
            rate = load * capacity[Batching.CONTINUOUS]
            due_s = poisson(rate, plan.seconds, _ARRIVAL_SEED)
            asks = make(len(due_s), _ARRIVAL_SEED)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            found = await asyncio.gather(*(d.open_loop(_requests(asks), due_s) for d in drivers.values()))
            cpu = (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)
            case = {"workload": workload, "load": load, "rate": rate, "driver_cpu": cpu}
            rows += _rows(case, capacity, asks, dict(zip(drivers, found, strict=True)))
            for row in rows[-len(drivers) :]:
                console.print(
                    f"{row.batching} at {rate:.2f}/s: p50 {row.p50_ms:.0f}, p99 {row.p99_ms:.0f} ms"
                )
    return rows


def _rows(
    case: dict[str, Any],
    capacity: dict[Batching, float],
    asks: Sequence[Ask],
    outcomes: dict[Batching, list[Outcome]],
) -> list[Row]:
    is_short = [ask.answer_length is not None and ask.answer_length <= SHORT for ask in asks]
    sums = {policy: summarize(found) for policy, found in outcomes.items()}
    shorts = {policy: summarize(list(compress(found, is_short))) for policy, found in outcomes.items()}
    (gathering,) = sums.keys() - {Batching.CONTINUOUS}
    gather, gather_short = sums[gathering], shorts[gathering]
    rows = []
    for policy, one in sums.items():
        compared = policy is Batching.CONTINUOUS
        rows.append(
            Row(
                **case,
                batching=policy.value,
                capacity=capacity[policy],
                sent=one.sent,
                answered=one.answered,
                errors=one.errors,
                p50_ms=one.p50_ms,
                p90_ms=one.p90_ms,
                p99_ms=one.p99_ms,
                short_p99_ms=shorts[policy].p99_ms,
                mean_ms=one.mean_ms,
                p50_ratio=one.p50_ms / gather.p50_ms if compared else None,
                p99_ratio=one.p99_ms / gather.p99_ms if compared else None,
                short_p99_ratio=shorts[policy].p99_ms / gather_short.p99_ms if compared else None,
                max_send_lag_ms=one.max_send_lag_ms,
            )
        )
    return rows


def _requests(asks: Sequence[Ask]) -> list[bytes]:
    return [ask.request for ask in asks]


async def _capacity(drivers: dict[Batching, Driver], requests: Sequence[bytes]) -> dict[Batching, float]:
    """Questions a second of each in a closed loop. Raises RuntimeError where one fails: that would be no capacity."""
    found = await asyncio.gather(*(d.closed_loop(requests, CONCURRENCY) for d in drivers.values()))
    for outcomes, _ in found:
        if errors := summarize(outcomes).errors:
            raise RuntimeError(f"questions failed while capacity was measured: {errors}")
    return {policy: len(requests) / seconds for policy, (_, seconds) in zip(drivers, found, strict=True)}


@contextmanager
def contexts_workload(
    model: str, policies: Sequence[Batching], folder: Path, threads: int
) -> Iterator[tuple[dict[Batching, str], MakeAsks]]:
    """Questions with random contexts, for a generator of random weights."""
    config = checkpoint.save(model, folder / "generator")
    flags = flags_of_generator(folder / "generator")

    def make(count: int, seed: int) -> list[Ask]:
        return [Ask(q.request(), q.answer_length) for q in draw(Mix(), count, config.vocab_size, seed)]

    with generators(flags, policies, folder / "logs", threads) as addresses:
        yield addresses, make


@contextmanager
def pair_workload(
    policies: Sequence[Batching], folder: Path, threads: int, console: Console
) -> Iterator[tuple[dict[Batching, str], MakeAsks]]:
    """The demo's questions as texts, through its retriever; answers end where the checkpoint ends them."""
    lines = (DEMO / "questions.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines]

    def make(count: int, seed: int) -> list[Ask]:
        random, mix = np.random.default_rng(seed), Mix()
        asks = []
        for _ in range(count):
            strategy: Strategy = mix.strategies[int(random.integers(len(mix.strategies)))]
            options = {"strategy": strategy.value, "num_beams": int(random.choice(mix.num_beams))}
            text = texts[int(random.integers(len(texts)))]
            asks.append(Ask(messages.generate_request(text, options).SerializeToString()))
        return asks

    with (
        demo_retriever(folder / "logs", console) as (_, flags),
        generators(flags, policies, folder / "logs", threads) as addresses,
    ):
        yield addresses, make


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 takes about three minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="fewer questions, a shorter time")
    parser.add_argument("--workload", choices=["contexts", "pair"], default="contexts")
    parser.add_argument("--model", choices=sorted(checkpoint.SHAPES), default=checkpoint.SMALL)
    parser.add_argument(
        "--threads", type=int, default=max(1, num_cores() // 2), help="of each of the two generators"
    )
    parser.add_argument(
        "--baseline",
        choices=[policy.value for policy in Batching if policy is not Batching.CONTINUOUS],
        default=Batching.GATHER.value,
        help="answers of a batch together, or each when it is there",
    )
    parser.add_argument("--seconds", type=float, help="of arrivals at each load")
    arguments = parser.parse_args()
    plan = Plan(96, 45.0) if arguments.quick else Plan(400, 240.0)
    plan = Plan(plan.capacity_questions, arguments.seconds or plan.seconds)
    policies = (Batching.CONTINUOUS, Batching(arguments.baseline))
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.workload == "pair":
            workload = pair_workload(policies, folder, arguments.threads, console)
        else:
            workload = contexts_workload(arguments.model, policies, folder, arguments.threads)
        with workload as (addresses, make):
            rows = asyncio.run(measure(addresses, make, plan, arguments.workload, console))
    found = [asdict(row) for row in rows]
    report.show(describe(arguments.threads), found, console)
    report.write(found, arguments.json)


if __name__ == "__main__":
    main()
