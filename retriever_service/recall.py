"""Recall of an answer, from an exact search in a part of the documents, whose cost does not grow with their number."""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from retriever_service.exact_search import similarities
from retriever_service.types import Float32Array, Metric


def random_part(next_row: int, size: int, chance: random.Random) -> Sequence[range]:
    """Returns `size` successive rows of 0 to next_row - 1, each as likely to be among them as any other.

    Those that begin before the end and go on at the beginning are two ranges. At least one row, and at most all.
    """
    size = max(1, min(size, next_row))
    first = chance.randrange(max(1, next_row))
    if first + size <= next_row:
        return [range(first, first + size)]
    return [range(first + size - next_row), range(first, next_row)]


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
