"""The generator's metrics: names as Prometheus wants them, counts that outlive a worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

from generator_service.engine.messages import Generated, Stats
from generator_service.engine.scheduler import Scheduler, SchedulerLimits
from generator_service.metrics import GeneratorMetrics
from generator_service.types import Hypothesis, Strategy
from rag_serving.metrics import Metrics
from tests.generator_service.engine.test_engine_core import core, drained, work


def worker(tokens: int, at_s: float, restarts: int = 0) -> Any:
    stats = Stats(
        waiting=3,
        running=2,
        rows=10,
        cache_bytes=100,
        cache_budget_bytes=1000,
        steps=5,
        step_s={"decode": 0.5},
        tokens=tokens,
        at_s=at_s,
    )
    return SimpleNamespace(device="cpu", ready=True, restarts=restarts, num_pending=5, stats=stats)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"rag_generator_{name}", labels)


def test_counts_go_on_when_a_worker_begins_again() -> None:
    """They were gauges of the worker's own counts, and fell to nothing with each restart."""
    metrics = Metrics("generator")
    generator = GeneratorMetrics(metrics)
    generator.refresh([worker(100, 1.0)])
    generator.refresh([worker(300, 3.0)], questions_per_second=7.5, retried=2)
    assert value(metrics, "engine_tokens_per_second", device="cpu") == pytest.approx(100.0)
    generator.refresh([worker(40, 4.0, restarts=1)], retried=2)
    assert value(metrics, "engine_tokens_total", device="cpu") == 340.0
    assert value(metrics, "worker_restarts_total", device="cpu") == 1.0
    assert value(metrics, "questions_retried_total") == 2.0


def test_time_to_first_token_is_measured_by_strategy() -> None:
    metrics = Metrics("generator")
    answer = Hypothesis(token_ids=[2, 5, 2], score=0.0, log_likelihood=0.0, document_posterior=[1.0])
    report = Generated(request_id=1, hypotheses=[answer], queue_s=0.01, first_token_s=0.25, generate_s=0.5)
    GeneratorMetrics(metrics).observe_answers(Strategy.RAG_TOKEN, [report])
    assert value(metrics, "time_to_first_token_seconds_sum", strategy="rag_token") == 0.25


def test_every_part_of_a_step_and_what_runs_and_waits_is_exported() -> None:
    engine = core()
    narrow = SchedulerLimits(max_rows=4)
    engine._scheduler = Scheduler(engine._cache, narrow)
    for request_id in range(4):
        engine.add_request(work(request_id))
    engine.step()
    engine.step()
    metrics = Metrics("generator")
    generator = GeneratorMetrics(metrics)
    held = SimpleNamespace(device="cpu", ready=True, restarts=0, num_pending=4, stats=engine.stats())
    generator.refresh([held], questions_per_second=2.5)  # type: ignore[list-item]
    for part in ("schedule", "encode", "decode", "score", "output"):
        seconds = value(metrics, "engine_step_seconds_total", device="cpu", part=part)
        assert seconds is not None, part
        assert seconds > 0, part
    exported = {
        name: value(metrics, name, device="cpu")
        for name in (
            "questions_running",
            "questions_waiting",
            "questions_in_work",
            "decoder_rows",
            "cache_budget_bytes",
            "engine_steps_total",
        )
    }
    assert exported == {
        "questions_running": 1.0,
        "questions_waiting": 3.0,
        "questions_in_work": 4.0,
        "decoder_rows": 4.0,
        "cache_budget_bytes": 1e9,
        "engine_steps_total": 2.0,
    }
    assert value(metrics, "cache_reserved_bytes", device="cpu") == engine._cache.reserved_bytes > 0
    assert value(metrics, "questions_per_second") == 2.5
    answered = [report for report in drained(engine) if isinstance(report, Generated)]
    generator.observe_answers(Strategy.RAG_SEQUENCE, answered)
    assert value(metrics, "questions_total", strategy="rag_sequence") == 4.0
    assert value(metrics, "queue_seconds_count") == 4.0
    assert value(metrics, "queue_seconds_sum") == pytest.approx(sum(r.queue_s for r in answered))
    assert value(metrics, "generate_seconds_count", strategy="rag_sequence") == 4.0
    assert value(metrics, "time_to_first_token_seconds_count", strategy="rag_sequence") == 4.0


def test_names_pass_prometheus_rules() -> None:
    """What promtool check metrics asks: counters end in _total and nothing else does, every metric has a help."""
    metrics = Metrics("generator")
    GeneratorMetrics(metrics).refresh([worker(1, 1.0)])
    for family in metrics.registry.collect():
        assert family.documentation
        if family.name.startswith("rag_"):
            reserved = ("_total", "_count", "_sum", "_bucket", "_info")
            assert not family.name.endswith(reserved), family.name
            assert not any(unit in family.name for unit in ("_ms", "_millis", "_kb", "_mib")), family.name
    assert b"rag_generator_engine_steps_total{" in generate_latest(metrics.registry)
