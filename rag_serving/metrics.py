"""Prometheus metrics of a service under names of one form: rag_<service>_<thing>_<unit>."""

import re
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# Seconds: from a cached look-up to a long generation, about a factor of two apart.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


class Metrics:
    """Makes the metrics of one service in a registry of its own.

    `thing` is what follows rag_<service>_ and ends in its unit: "search_seconds", "index_vectors". Labels
    must have few values: never a text or an id that a caller chose. Each maker raises ValueError on a bad
    or repeated name.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def counter(self, thing: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A count that only grows; its name must end in _total."""
        if not thing.endswith("_total"):
            raise ValueError(f"a counter's name ends in _total, {thing!r} does not")
        return Counter(self._name(thing), text, labels, registry=self.registry)

    def gauge(self, thing: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A value that goes up and down."""
        return Gauge(self._name(thing), text, labels, registry=self.registry)

    def histogram(
        self,
        thing: str,
        text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """A distribution over upper bounds in the metric's unit."""
        return Histogram(self._name(thing), text, labels, registry=self.registry, buckets=buckets)

    def _name(self, thing: str) -> str:
        if not _NAME.fullmatch(thing):
            raise ValueError(f"a metric's name is lower case words joined by _, {thing!r} is not")
        return f"rag_{self.service}_{thing}"
