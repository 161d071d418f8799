"""Live recall: some of the questions answered are searched again exactly, off the request path."""

import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np

from rag_serving.errors import RagError
from retriever_service.exact_search import exact_search
from retriever_service.index.base import VectorIndex
from retriever_service.metrics import RetrieverMetrics
from retriever_service.recall import random_part, recall_in_part
from retriever_service.store.base import DocumentStore
from retriever_service.types import Float32Array, Int64Array, Selection

logger = logging.getLogger(__name__)

_REST_FACTOR = 9  # an exact search rests nine times as long as it took: at most a tenth of one core
_MOST_ROWS = 65_536
"""Rows that a sample compares at most: all of a large corpus would be read from its disk each time."""


class RecallSampler:
    """Compares answers with exact search: one at a time, in a thread of its own, and never for long.

    All methods belong to the event loop's thread.
    """

    def __init__(
        self,
        index: VectorIndex,
        store: DocumentStore,
        metrics: RetrieverMetrics,
        executor: Executor,
        *,
        rate: float,
        seed: int | None = None,
    ) -> None:
        """`rate` is the share of questions to sample, 0 to 1; an exhaustive index is never sampled."""
        self._index = index
        self._store = store
        self._metrics = metrics
        self._executor = executor
        self._rate = 0.0 if index.is_exhaustive else rate
        self._random = random.Random(seed)  # noqa: S311  (a sample is no secret)
        self._running: Future[None] | None = None
        self._rests_until_s = 0.0

    def offer(
        self, vectors: Float32Array, n_docs: int, rows: Int64Array, selection: Selection | None
    ) -> None:
        """Takes vectors float32 [batch, dim] and the rows found for them, and samples at most one question."""
        if self._rate == 0 or self._index.ntotal == 0:
            return
        chosen = [place for place in range(len(vectors)) if self._random.random() < self._rate]
        busy = self._running is not None and not self._running.done()
        if not chosen or busy or time.monotonic() < self._rests_until_s:
            return
        place = chosen[0]
        self._running = self._executor.submit(
            self._measure, vectors[place : place + 1], n_docs, rows[place], selection
        )

    def _measure(
        self, vector: Float32Array, n_docs: int, rows: Int64Array, selection: Selection | None
    ) -> None:
        began_s = time.monotonic()
        try:
            if self._index.measures_recall:
                recall = self._index.measured_recall(vector, n_docs, rows, selection)
            else:
                recall = self._compared(vector, n_docs, rows, selection)
            if recall is not None:
                self._metrics.live_recall_ratio.observe(recall)
        except RagError as error:
            logger.warning("cannot sample the recall: %s", error.message)
        finally:
            self._rests_until_s = time.monotonic() + _REST_FACTOR * (time.monotonic() - began_s)

    def _compared(
        self, vector: Float32Array, n_docs: int, rows: Int64Array, selection: Selection | None
    ) -> float | None:
        next_row = self._store.next_row
        if next_row > _MOST_ROWS:
            part = random_part(next_row, _MOST_ROWS, self._random)
            return self._compared_in_part(vector, n_docs, rows, selection, part)
        living = self._store.rows()
        if not np.isin(rows[rows >= 0], living).all():
            return None  # a document of the answer was deleted or replaced since: no fault of the index
        among = living if selection is None else np.intersect1d(selection.rows_before(next_row), living)
        best = exact_search(self._store, vector, n_docs, self._index.metric, among)[0]
        return float(np.isin(best, rows).mean()) if len(best) else None

    def _compared_in_part(
        self,
        vector: Float32Array,
        n_docs: int,
        rows: Int64Array,
        selection: Selection | None,
        part: Sequence[range],
    ) -> float | None:
        found = rows[rows >= 0].tolist()
        if len(self._store.documents_by_row(found)) < len(found):
            return None  # as above
        among = np.concatenate([self._store.rows_between(some.start, some.stop) for some in part])
        if selection is not None:
            among = np.intersect1d(selection.rows_before(part[-1].stop), among)
        best = exact_search(self._store, vector, n_docs, self._index.metric, among)[0].tolist()
        embeddings = dict(zip([*found, *best], self._store.embeddings_of([*found, *best]), strict=True))
        return recall_in_part(
            vector,
            n_docs,
            {row: embeddings[row] for row in found},
            {row: embeddings[row] for row in best},
            self._index.metric,
        )
