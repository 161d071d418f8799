"""The generator's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Sequence

from generator_service.engine.messages import Generated, Stats
from generator_service.engine.worker import Worker
from generator_service.types import Strategy
from rag_serving.metrics import Metrics

_TOKEN_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class GeneratorMetrics:
    """Made once a process; observe what a request did, refresh what the workers say."""

    def __init__(self, metrics: Metrics) -> None:
        self._questions = metrics.counter("questions_total", "questions answered", ["strategy"])
        self._abstentions = metrics.counter(
            "abstentions_total", "questions answered below the confidence asked for, and so not", ["strategy"]
        )
        self._tokens = metrics.counter(
            "generated_tokens_total", "tokens of returned hypotheses", ["strategy"]
        )
        self._answer_tokens = metrics.histogram(
            "answer_tokens", "tokens of the best hypothesis", ["strategy"], buckets=_TOKEN_BUCKETS
        )
        self.encode_seconds = metrics.histogram(
            "encode_seconds", "question encoding of a request, waiting included"
        )
        self.retrieve_seconds = metrics.histogram("retrieve_seconds", "calls to the retriever")
        self._queue_seconds = metrics.histogram(
            "queue_seconds", "waiting of a question for the running batch"
        )
        self._generate_seconds = metrics.histogram(
            "generate_seconds", "from admission to answer", ["strategy"]
        )
        device = ["device"]
        self._up = metrics.gauge("worker_ready", "1 where the worker takes questions", device)
        self._restarts = metrics.gauge("worker_restarts", "times the worker was started again", device)
        self._pending = metrics.gauge(
            "questions_in_work", "requests sent to the worker and not answered", device
        )
        self._waiting = metrics.gauge("questions_waiting", "questions in the worker's queue", device)
        self._running = metrics.gauge("questions_running", "questions in the running batch", device)
        self._rows = metrics.gauge("decoder_rows", "rows of the running batch at their widest", device)
        self._cache = metrics.gauge("cache_reserved_bytes", "bytes of keys and values set aside", device)
        self._budget = metrics.gauge("cache_budget_bytes", "bytes of keys and values there can be", device)
        self._steps = metrics.gauge("engine_steps", "steps done since the worker began", device)
        self._step_seconds = metrics.gauge(
            "engine_step_seconds",
            "seconds in each part of the steps since the worker began",
            [*device, "part"],
        )

    def observe_answers(self, strategy: Strategy, reports: Sequence[Generated]) -> None:
        """Count the answers of one request."""
        name = strategy.value.lower()
        self._questions.labels(name).inc(len(reports))
        for report in reports:
            lengths = [len(h.token_ids) - 1 for h in report.hypotheses]
            self._tokens.labels(name).inc(sum(lengths))
            if lengths:
                self._answer_tokens.labels(name).observe(lengths[0])
            self._queue_seconds.observe(report.queue_s)
            self._generate_seconds.labels(name).observe(report.generate_s)

    def observe_abstentions(self, strategy: Strategy, count: int) -> None:
        """Count questions that were not confident enough to be answered."""
        self._abstentions.labels(strategy.value.lower()).inc(count)

    def refresh(self, workers: Sequence[Worker]) -> None:
        """Take over the workers' last heartbeats."""
        for worker in workers:
            self._up.labels(worker.device).set(worker.ready is not None)
            self._restarts.labels(worker.device).set(worker.restarts)
            self._pending.labels(worker.device).set(worker.num_pending)
            if worker.stats is not None:
                self._refresh_stats(worker.device, worker.stats)

    def _refresh_stats(self, device: str, stats: Stats) -> None:
        self._waiting.labels(device).set(stats.waiting)
        self._running.labels(device).set(stats.running)
        self._rows.labels(device).set(stats.rows)
        self._cache.labels(device).set(stats.cache_bytes)
        self._budget.labels(device).set(stats.cache_budget_bytes)
        self._steps.labels(device).set(stats.steps)
        for part, seconds in stats.step_s.items():
            self._step_seconds.labels(device, part).set(seconds)
