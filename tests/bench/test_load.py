"""The load generator: when it asks, what it counts, and both programs over services that really run."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from rich.console import Console

from bench.load import batching, checkpoint, report, served
from bench.load.arrivals import MAX_ARRIVALS, poisson
from bench.load.driver import GENERATE, Driver, connect
from bench.load.latency import OK, Outcome, summarize
from bench.load.questions import Mix, draw
from bench.load.services import flags_of_generator, generators
from generator_service.types import Batching
from rag.generator.v1 import generator_service_pb2


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson(50.0, 400.0, seed=3)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert 0 <= times[0] <= times[-1] < 400
    assert abs(len(times) - 20_000) < 5 * math.sqrt(20_000)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "gaps are exponential"
    counts = np.histogram(times, bins=400)[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.3), (
        "a second's count varies as much as its mean"
    )


def test_equal_seeds_give_equal_arrivals_and_equal_questions() -> None:
    assert (poisson(9.0, 5.0, 1) == poisson(9.0, 5.0, 1)).all()
    assert len(poisson(9.0, 5.0, 1)) != len(poisson(9.0, 5.0, 2))
    assert draw(Mix(), 5, 2000, 1) == draw(Mix(), 5, 2000, 1)
    assert draw(Mix(), 5, 2000, 1) != draw(Mix(), 5, 2000, 2)


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1.0), (1.0, -1.0), (MAX_ARRIVALS, 1.1)])
def test_arrivals_are_bounded(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"questions a second|positive"):
        poisson(rate, seconds, 1)


def test_percentiles_are_of_answers_and_errors_are_counted_by_code() -> None:
    outcomes = [Outcome(OK, i / 1000, 0.001) for i in range(1, 101)]
    outcomes += [Outcome("RESOURCE_EXHAUSTED", 9.0)] * 3 + [Outcome("UNAVAILABLE", 9.0, 0.02)]
    found = summarize(outcomes)
    assert (found.sent, found.answered) == (104, 100)
    assert found.errors == {"RESOURCE_EXHAUSTED": 3, "UNAVAILABLE": 1}
    assert found.p50_ms == pytest.approx(50.5)
    assert found.p90_ms == pytest.approx(90.1)
    assert found.p99_ms == pytest.approx(99.01)
    assert found.max_send_lag_ms == pytest.approx(20)


def test_nothing_answered_has_no_percentiles() -> None:
    found = summarize([Outcome("UNAVAILABLE", 1.0)])
    assert (found.answered, found.errors) == (0, {"UNAVAILABLE": 1})
    assert math.isnan(found.p50_ms)
    assert math.isnan(summarize([]).p99_ms)


def test_rows_are_json_even_where_a_figure_is_missing(tmp_path: Path) -> None:
    report.write([{"p50_ms": math.nan, "p99_ratio": None, "errors": {"UNAVAILABLE": 1}}], tmp_path / "rows")
    row = json.loads((tmp_path / "rows").read_text("utf-8"))
    assert row == {"p50_ms": None, "p99_ratio": None, "errors": {"UNAVAILABLE": 1}}


class Slow:
    """A Generate that answers one at a time, none before `first_after` were asked, and refuses what it is told to."""

    def __init__(self, first_after: int) -> None:
        self.one_at_a_time = asyncio.Lock()
        self.first_after = first_after
        self.all_asked = asyncio.Event()
        self.at_once = self.most_at_once = 0

    async def generate(self, request: bytes, context: Any) -> bytes:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.most_at_once >= self.first_after:
            self.all_asked.set()
        try:
            if request == b"refuse":
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
            async with self.one_at_a_time, asyncio.timeout(10):
                await self.all_asked.wait()
                await asyncio.sleep(0.05)
        finally:
            self.at_once -= 1
        return b""


@asynccontextmanager
async def slow_service(first_after: int = 0) -> AsyncIterator[tuple[Slow, Driver]]:
    slow, server = Slow(first_after), grpc.aio.server()
    service, method = GENERATE.strip("/").split("/")
    handler = grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(slow.generate)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}", timeout_s=20) as driver:
            yield slow, driver
    finally:
        await server.stop(None)


async def test_open_loop_does_not_wait_for_answers_and_counts_from_the_moment_due() -> None:
    """A closed loop, or one that counts from the sending, hides the queue that it makes."""
    async with slow_service(first_after=8) as (slow, driver):
        outcomes = await driver.open_loop([b""] * 8, np.zeros(8))
        assert slow.most_at_once == 8
    latencies = sorted(o.latency_s for o in outcomes)
    assert all(latency >= 0.04 * number for number, latency in enumerate(latencies, 1))


async def test_a_late_generator_is_part_of_the_latency() -> None:
    async with slow_service() as (_, driver):
        (late,) = await driver.open_loop([b""], np.array([-3.0]))
    assert late.latency_s >= 3
    assert late.send_lag_s >= 3


async def test_refusals_are_outcomes() -> None:
    async with slow_service() as (_, driver):
        outcomes = await driver.open_loop([b"refuse", b"", b"refuse"], np.array([0.0, 0.01, 0.02]))
    assert [o.code for o in outcomes] == ["RESOURCE_EXHAUSTED", OK, "RESOURCE_EXHAUSTED"]


async def test_closed_loop_keeps_its_concurrency_and_asks_each_once() -> None:
    async with slow_service(first_after=3) as (slow, driver):
        outcomes, seconds = await driver.closed_loop([b""] * 7, 3)
    assert len(outcomes) == 7
    assert slow.most_at_once == 3
    assert seconds >= 7 * 0.04


def test_a_question_is_the_same_over_the_wire_and_in_process() -> None:
    config = type("Config", (), dict.fromkeys(_CONFIG, 7))()
    (question,) = draw(Mix(num_beams=(2,)), 1, 2000, 1)
    request = generator_service_pb2.GenerateRequest.FromString(question.request())
    work = question.work(1, config)
    given = request.generation_config
    assert (given.num_beams, given.max_length, given.min_length) == (2, *[work.settings.max_length] * 2)
    assert work.settings.min_length == work.settings.max_length == question.answer_length + 1
    assert request.contexts.context_input_ids.shape == [5, max(map(len, question.contexts))]


_CONFIG = (
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "forced_eos_token_id",
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(checkpoint.SHAPES, "tiny", (1, 1, 32, 2, 2000))
    return "tiny"


@pytest.mark.parametrize("gathering", [Batching.GATHER, Batching.GATHER_EARLY])
def test_both_policies_answer_everything_at_the_same_moments(
    gathering: Batching, tiny: str, tmp_path: Path
) -> None:
    policies = (Batching.CONTINUOUS, gathering)
    config = checkpoint.save(tiny, tmp_path / "generator")
    flags = flags_of_generator(tmp_path / "generator")
    mix = Mix(answer_lengths=(2, 5), shares=(0.5, 0.5), n_docs=2, context_length=(5, 9))

    def make(count: int, seed: int) -> list[batching.Ask]:
        return [batching.Ask(q.request(), q.answer_length) for q in draw(mix, count, config.vocab_size, seed)]

    with generators(flags, policies, tmp_path / "logs", threads=1) as addresses:
        rows = asyncio.run(
            batching.measure(addresses, make, batching.Plan(8, 0.8), "contexts", Console(quiet=True))
        )
    assert [(r.batching, r.load) for r in rows] == [
        (policy.value, load) for load in (0.5, 0.7) for policy in policies
    ]
    assert all(r.answered == r.sent > 0 and not r.errors for r in rows)
    assert all(r.p50_ms <= r.p90_ms <= r.p99_ms for r in rows)
    for continuous, gather in (rows[:2], rows[2:]):
        assert continuous.rate == gather.rate
        assert continuous.sent == gather.sent
        assert continuous.p99_ratio == continuous.p99_ms / gather.p99_ms
        assert continuous.short_p99_ms == continuous.p99_ms, "all are short here"


def test_served_is_measured_beside_in_process(tiny: str, tmp_path: Path) -> None:
    row = asyncio.run(served.measure(tiny, tmp_path, 1, (3, 1, 2)))
    assert row.throughput_ratio == pytest.approx(row.served_qps / row.in_process_qps)
    assert row.in_process_p50_ms > 0
    assert row.served_p50_ms > 0
