"""Search by comparing with every stored embedding: for a few rows, and as the truth that recall is measured by."""

import numpy as np

from retriever_service.store.base import DocumentStore
from retriever_service.types import Float32Array, Int64Array, Metric

# Few: searches wait for the interpreter while Python takes them apart.
_ROWS_PER_CHUNK = 1024


def exact_search(
    store: DocumentStore, vectors: Float32Array, n_docs: int, metric: Metric, rows: Int64Array | range
) -> Int64Array:
    """Finds the best of `rows`, ascending, for vectors float32 [batch, dim].

    Returns rows int64 [batch, min(n_docs, len(rows))], best first, equal ones in row order. Memory is bounded:
    1024 embeddings are held at a time.
    """
    n_docs = min(n_docs, len(rows))
    best_rows = np.empty((len(vectors), 0), dtype=np.int64)
    best = np.empty((len(vectors), 0), dtype=np.float64)
    questions = vectors.astype(np.float64)
    for start in range(0, len(rows), _ROWS_PER_CHUNK):
        chunk = np.asarray(rows[start : start + _ROWS_PER_CHUNK], dtype=np.int64)
        scores = similarities(questions, store.embeddings_of(chunk.tolist()), metric)
        best = np.concatenate([best, scores], axis=1)
        best_rows = np.concatenate([best_rows, np.broadcast_to(chunk, scores.shape)], axis=1)
        # Stable: what stood before, of lower rows, wins a tie.
        order = np.argsort(-best, axis=1, kind="stable")[:, :n_docs]
        best, best_rows = np.take_along_axis(best, order, 1), np.take_along_axis(best_rows, order, 1)
    return best_rows


def similarities(questions: np.ndarray, embeddings: Float32Array, metric: Metric) -> np.ndarray:
    """Returns float64 [batch, rows], larger is nearer: inner products, or negated squared distances."""
    documents = embeddings.astype(np.float64)
    products = questions @ documents.T
    if metric is Metric.INNER_PRODUCT:
        return np.asarray(products)
    squares = np.square(questions).sum(axis=1)[:, None] + np.square(documents).sum(axis=1)[None, :]
    return np.asarray(2 * products - squares)
