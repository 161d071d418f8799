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
from pathlib import Path

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

MakeRequests = Callable[[int, int], list[bytes]]
"""From a count and a seed to that many requests, serialised."""


@dataclass(frozen=True)
class Plan:
    """How much is asked: questions to measure capacity with, and slices of seconds at each load."""

    capacity_questions: int
    slices: int
    slice_s: float


@dataclass(frozen=True)
class Row:
    """One policy at one load; ratios are continuous to gather-then-run, on the row of CONTINUOUS."""

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
    mean_ms: float
    p50_ratio: float | None
    p99_ratio: float | None
    max_send_lag_ms: float
    driver_cpu: float


async def measure(
    addresses: dict[Batching, str], make: MakeRequests, plan: Plan, workload: str, console: Console
) -> list[Row]:
    """Capacity of both, then both at shares of continuous batching's, slice by slice, at the same moments."""
    drivers = {}
    async with AsyncExitStack() as stack:
        for policy, address in addresses.items():
            drivers[policy] = await stack.enter_async_context(connect(address))
        capacity = {}
        for policy, driver in drivers.items():
            await _check(driver, make(min(CONCURRENCY, plan.capacity_questions), 0))  # warm up
            requests = make(plan.capacity_questions, _CAPACITY_SEED)
            capacity[policy] = len(requests) / await _check(driver, requests)
            console.print(f"{policy.value}: {capacity[policy]:.2f} questions/s at {CONCURRENCY} concurrent")
        rows = []
        for load in LOADS:
            rate = load * capacity[Batching.CONTINUOUS]
            rows += await _at_rate(drivers, make, plan, (workload, load, rate), capacity, console)
    return rows


async def _at_rate(
    drivers: dict[Batching, Driver],
    make: MakeRequests,
    plan: Plan,
    case: tuple[str, float, float],
    capacity: dict[Batching, float],
    console: Console,
) -> list[Row]:
    workload, load, rate = case
    outcomes: dict[Batching, list[Outcome]] = {policy: [] for policy in drivers}
    cpu_s = dict.fromkeys(drivers, 0.0)
    wall_s = dict.fromkeys(drivers, 0.0)
    for number in range(plan.slices):
        due_s = poisson(rate, plan.slice_s, _ARRIVAL_SEED + number)
        requests = make(len(due_s), _ARRIVAL_SEED + number)
        for policy, driver in drivers.items():
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            outcomes[policy] += await driver.open_loop(requests, due_s)
            cpu_s[policy] += time.process_time() - began_cpu_s
            wall_s[policy] += time.perf_counter() - began_s
            so_far = summarize(outcomes[policy])
            console.print(
                f"{policy.value} at {rate:.2f}/s, slice {number + 1}:"
                f" p50 {so_far.p50_ms:.0f}, p99 {so_far.p99_ms:.0f} ms"
            )
    sums = {policy: summarize(found) for policy, found in outcomes.items()}
    gather = sums[Batching.GATHER]
    rows = []
    for policy, found in sums.items():
        ratios: tuple[float | None, float | None] = (None, None)
        if policy is Batching.CONTINUOUS:
            ratios = (found.p50_ms / gather.p50_ms, found.p99_ms / gather.p99_ms)
        rows.append(
            Row(
                workload,
                policy.value,
                load,
                rate,
                capacity[policy],
                found.sent,
                found.answered,
                found.errors,
                found.p50_ms,
                found.p90_ms,
                found.p99_ms,
                found.mean_ms,
                *ratios,
                found.max_send_lag_ms,
                cpu_s[policy] / wall_s[policy],
            )
        )
    return rows


async def _check(driver: Driver, requests: Sequence[bytes]) -> float:
    """Seconds for all of them in a closed loop. Raises RuntimeError where one fails: that would be no capacity."""
    outcomes, seconds = await driver.closed_loop(requests, CONCURRENCY)
    if failed := summarize(outcomes).errors:
        raise RuntimeError(f"questions failed while capacity was measured: {failed}")
    return seconds


@contextmanager
def contexts_workload(
    model: str, folder: Path, threads: int
) -> Iterator[tuple[dict[Batching, str], MakeRequests]]:
    """Questions with random contexts, for a generator of random weights."""
    config = checkpoint.save(model, folder / "generator")
    flags = flags_of_generator(folder / "generator")
    with generators(flags, tuple(Batching), folder / "logs", threads) as addresses:
        yield (
            addresses,
            lambda count, seed: [q.request() for q in draw(Mix(), count, config.vocab_size, seed)],
        )


@contextmanager
def pair_workload(
    folder: Path, threads: int, console: Console
) -> Iterator[tuple[dict[Batching, str], MakeRequests]]:
    """The demo's questions as texts, through its retriever; answers end where the checkpoint ends them."""
    lines = (DEMO / "questions.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines]

    def make(count: int, seed: int) -> list[bytes]:
        random, mix = np.random.default_rng(seed), Mix()
        requests = []
        for _ in range(count):
            strategy: Strategy = mix.strategies[int(random.integers(len(mix.strategies)))]
            options = {"strategy": strategy.value, "num_beams": int(random.choice(mix.num_beams))}
            text = texts[int(random.integers(len(texts)))]
            requests.append(messages.generate_request(text, options).SerializeToString())
        return requests

    with (
        demo_retriever(folder / "logs", console) as (_, flags),
        generators(flags, tuple(Batching), folder / "logs", threads) as addresses,
    ):
        yield addresses, make


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 takes about three minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one short slice a load and policy")
    parser.add_argument("--workload", choices=["contexts", "pair"], default="contexts")
    parser.add_argument("--model", choices=sorted(checkpoint.SHAPES), default=checkpoint.SMALL)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--slices", type=int, help="of each load and policy, in turn")
    parser.add_argument("--slice-s", type=float, help="seconds of arrivals in a slice")
    arguments = parser.parse_args()
    plan = Plan(96, 1, 25.0) if arguments.quick else Plan(480, 3, 60.0)
    plan = Plan(plan.capacity_questions, arguments.slices or plan.slices, arguments.slice_s or plan.slice_s)
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.workload == "pair":
            workload = pair_workload(folder, arguments.threads, console)
        else:
            workload = contexts_workload(arguments.model, folder, arguments.threads)
        with workload as (addresses, make):
            rows = asyncio.run(measure(addresses, make, plan, arguments.workload, console))
    found = [asdict(row) for row in rows]
    report.show(describe(arguments.threads), found, console)
    report.write(found, arguments.json)


if __name__ == "__main__":
    main()
