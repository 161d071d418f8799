"""What the retriever measures, beside the RPC metrics that every service has."""

from rag_serving.metrics import Metrics

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DOCS_BUCKETS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)
# Seconds: a search of a small Flat index takes tens of microseconds.
_STEP_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_RECALL_BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)


class RetrieverMetrics:
    """The retriever's metrics, in the registry of `metrics`."""

    def __init__(self, metrics: Metrics) -> None:
        self.search_seconds = metrics.histogram(
            "search_seconds", "Time of one search of the index, for a whole batch", buckets=_STEP_BUCKETS_S
        )
        self.search_batch_questions = metrics.histogram(
            "search_batch_questions", "Questions gathered into one search", buckets=_BATCH_BUCKETS
        )
        self.queue_wait_seconds = metrics.histogram(
            "queue_wait_seconds", "Time that a request waits for its search to begin", buckets=_STEP_BUCKETS_S
        )
        self.assemble_seconds = metrics.histogram(
            "assemble_seconds",
            "Time to fetch, score and assemble the documents of the requests done together",
            buckets=_STEP_BUCKETS_S,
        )
        self.docs_found = metrics.histogram(
            "docs_found", "Documents found for a question", buckets=_DOCS_BUCKETS
        )
        self.questions_cut_total = metrics.counter(
            "questions_cut_total", "Questions that did not fit a context of their own"
        )
        self.live_recall_ratio = metrics.histogram(
            "live_recall_ratio",
            "Share of the exact n_docs nearest documents that a sampled answer held",
            buckets=_RECALL_BUCKETS,
        )
        self.questions_in_flight = metrics.gauge(
            "questions_in_flight", "Questions accepted and not yet answered"
        )
        self.index_vectors = metrics.gauge("index_vectors", "Vectors in the index that serves")
        self.index_device = metrics.gauge(
            "index_device", "1 for each device that holds the index that serves: cpu, cuda:0", ["device"]
        )
        self.index_fallback = metrics.gauge(
            "index_fallback",
            "1 while the index that serves was to be on GPUs and is on the CPU, by why: memory_map, no_gpu, kind,"
            " copy_failed",
            ["reason"],
        )
        self.search_fallbacks_total = metrics.counter(
            "search_fallbacks_total",
            "Searches of an index on GPUs that the CPU answered, by why: selection, candidates, too_few_left, failed",
            ["reason"],
        )
        self.index_generation = metrics.gauge("index_generation", "Generation of the index that serves")
