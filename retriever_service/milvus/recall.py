"""Recall of an answer, from an exact search in a part of the documents, whose cost does not grow with their number."""

import random
from collections.abc import Mapping

import numpy as np

from retriever_service.exact_search import similarities
from retriever_service.types import Float32Array, Metric

# Milvus compares one by one where a filter leaves less than a fifteenth of an HNSW index: there its search is exact.
_LARGEST_SHARE = 16
_MOST_ROWS = 1_000_000


def random_part(next_row: int, chance: random.Random) -> str:
    """Returns the condition of some successive rows of 0 to next_row - 1, each as likely to be in it as any other."""
    width = max(1, min(_MOST_ROWS, next_row // _LARGEST_SHARE))
    first = chance.randrange(max(1, next_row))
    if first + width <= next_row:
        return f"row >= {first} and row < {first + width}"
    return f"(row >= {first} or row < {first + width - next_row})"


def recall_in_part(
    vector: Float32Array,
    n_docs: int,
    answer: Mapping[int, Float32Array],
    part: Mapping[int, Float32Array],
    metric: Metric,
) -> float | None:
    """Returns how many of the documents in `part` that belong to the answer it holds, None where there are none.

    `answer` and `part` are embeddings float32 [dim] by row, `part` those nearest to `vector` float32 [1, dim] in a
    part of the documents. What is nearer than the answer's farthest document belongs to the answer. Over many parts,
    n_docs / (n_docs + documents passed over) comes out: the recall, but for low ones, which it flatters: 0.5 reads
    as at most 0.67.
    """
    if not part:
        return None
    farthest = -np.inf
    if len(answer) >= n_docs:
        farthest = _similarities(vector, answer, metric).min()
    belongs = [
        row in answer
        for row, score in zip(part, _similarities(vector, part, metric).tolist(), strict=True)
        if row in answer or score > farthest
    ]
    return sum(belongs) / len(belongs) if belongs else None


def _similarities(vector: Float32Array, of: Mapping[int, Float32Array], metric: Metric) -> np.ndarray:
    return np.asarray(similarities(vector.astype(np.float64), np.stack(list(of.values())), metric)[0])
