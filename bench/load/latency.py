"""Latencies and errors of many calls, summed up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OK = "OK"


@dataclass(frozen=True)
class Outcome:
    """One call: the gRPC status, and the seconds from the moment it was due until it was over.

    send_lag_s is how much later than due it was sent: the load generator's own fault, part of the latency.
    """

    code: str
    latency_s: float
    send_lag_s: float = 0.0


@dataclass(frozen=True)
class Summary:
    """Percentiles in milliseconds are over the answered calls, exact; errors are counted by gRPC status."""

    sent: int
    answered: int
    errors: dict[str, int]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    max_send_lag_ms: float


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Sums up; where nothing was answered, percentiles are nan."""
    codes = Counter(outcome.code for outcome in outcomes)
    times = np.array([o.latency_s for o in outcomes if o.code == OK]) * 1000
    p50, p90, p99 = np.percentile(times, [50, 90, 99]) if len(times) else [float("nan")] * 3
    return Summary(
        sent=len(outcomes),
        answered=len(times),
        errors={code: count for code, count in sorted(codes.items()) if code != OK},
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        mean_ms=float(times.mean()) if len(times) else float("nan"),
        max_send_lag_ms=max((o.send_lag_s for o in outcomes), default=0.0) * 1000,
    )
