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
        self._restarts = metrics.counter(
            "worker_restarts_total", "times the worker was started again", device
        )
        self._pending = metrics.gauge(
            "questions_in_work", "requests sent to the worker and not answered", device
        )
        self._waiting = metrics.gauge("questions_waiting", "questions in the worker's queue", device)
        self._running = metrics.gauge("questions_running", "questions in the running batch", device)
        self._rows = metrics.gauge("decoder_rows", "rows of the running batch at their widest", device)
        self._cache = metrics.gauge("cache_reserved_bytes", "bytes of keys and values set aside", device)
        self._budget = metrics.gauge("cache_budget_bytes", "bytes of keys and values there can be", device)
        self._first_token_seconds = metrics.histogram(
            "time_to_first_token_seconds",
            "from a question's arrival in the queue to its first token",
            ["strategy"],
        )
        self._steps = metrics.counter("engine_steps_total", "steps of the engine", device)
        self._engine_tokens = metrics.counter(
            "engine_tokens_total", "tokens decoded, of all hypotheses of all searches", device
        )
        self._step_seconds = metrics.counter(
            "engine_step_seconds_total", "seconds in each part of the steps", [*device, "part"]
        )
        self._retried = metrics.counter(
            "questions_retried_total", "questions that went to another worker after theirs had died"
        )
        self._questions_rate = metrics.gauge(
            "questions_per_second",
            "questions, encodings and scores answered a second, over the last ten seconds",
        )
        self._tokens_rate = metrics.gauge(
            "engine_tokens_per_second", "tokens decoded a second, between two heartbeats", device
        )
        self._seen: dict[tuple[str, ...], float] = {}
        self._tokens_at: dict[str, tuple[float, int]] = {}

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
            self._first_token_seconds.labels(name).observe(report.first_token_s)
            self._generate_seconds.labels(name).observe(report.generate_s)

    def observe_abstentions(self, strategy: Strategy, count: int) -> None:
        """Count questions that were not confident enough to be answered."""
        self._abstentions.labels(strategy.value.lower()).inc(count)

    def refresh(
        self, workers: Sequence[Worker], *, questions_per_second: float = 0.0, retried: int = 0
    ) -> None:
        """Take over the workers' last heartbeats, and what the service itself counts."""
        self._questions_rate.set(questions_per_second)
        self._retried.inc(self._grown(retried, "retried"))
        for worker in workers:
            self._up.labels(worker.device).set(worker.ready is not None)
            self._restarts.labels(worker.device).inc(self._grown(worker.restarts, "restarts", worker.device))
            self._pending.labels(worker.device).set(worker.num_pending)
            if worker.stats is not None:
                self._refresh_stats(worker.device, worker.stats)

    def _refresh_stats(self, device: str, stats: Stats) -> None:
        self._waiting.labels(device).set(stats.waiting)
        self._running.labels(device).set(stats.running)
        self._rows.labels(device).set(stats.rows)
        self._cache.labels(device).set(stats.cache_bytes)
        self._budget.labels(device).set(stats.cache_budget_bytes)
        self._steps.labels(device).inc(self._grown(stats.steps, "steps", device))
        self._engine_tokens.labels(device).inc(self._grown(stats.tokens, "tokens", device))
        for part, seconds in stats.step_s.items():
            self._step_seconds.labels(device, part).inc(self._grown(seconds, "step", device, part))
        before_s, before = self._tokens_at.get(device, (stats.at_s, stats.tokens))
        if stats.at_s != before_s:
            tokens = stats.tokens - before if stats.tokens >= before else stats.tokens
            self._tokens_rate.labels(device).set(tokens / (stats.at_s - before_s))
        self._tokens_at[device] = (stats.at_s, stats.tokens)

    def _grown(self, value: float, *key: str) -> float:
        """By how much a worker's count has grown; a worker that was started again counts from nothing."""
        before = self._seen.get(key, 0.0)
        self._seen[key] = value
        return value - before if value >= before else value
