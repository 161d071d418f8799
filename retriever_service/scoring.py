"""Exact doc_scores of candidates from their stored embeddings: pure functions on arrays."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag_serving.errors import InvalidArgumentError
from retriever_service.types import Float32Array, Int64Array, Metric


@dataclass(frozen=True, slots=True)
class Scored:
    """Best first: rows int64 and doc_scores float32 [batch, n], doc_embeds float32 [batch, n, dim].

    What is not found stands last: -1, -inf, 0.
    """

    rows: Int64Array
    doc_scores: Float32Array
    doc_embeds: Float32Array

    def of(self, start: int, stop: int) -> "Scored":
        """Returns some of the questions, trimmed to the most hits of one."""
        rows = self.rows[start:stop]
        width = int((rows >= 0).sum(axis=1).max(initial=0))
        return Scored(
            rows[:, :width], self.doc_scores[start:stop, :width], self.doc_embeds[start:stop, :width]
        )


def score(
    questions: Float32Array,
    found: Int64Array,
    doc_embeds: Float32Array,
    n_docs: int,
    metric: Metric,
    threshold: float | None,
) -> Scored:
    """Scores found int64 [batch, candidates], -1 where there is none, with doc_embeds [batch, candidates, dim].

    Products are summed in float64 and rounded once: a score depends neither on the batch it came in nor
    on the index's kind. Equal scores stand in row order. Of more candidates than n_docs, the nearest by
    the index's metric are kept; those below the threshold are not. Raises InvalidArgumentError where a score
    overflows.
    """
    exact = np.einsum("bd,bnd->bn", questions, doc_embeds, dtype=np.float64)
    with np.errstate(over="ignore"):
        doc_scores = np.where(found >= 0, exact, -np.inf).astype(np.float32)
    if not np.isfinite(doc_scores[found >= 0]).all():
        raise InvalidArgumentError("question_hidden_states", "too large: a doc_score overflows float32")
    kept = _nearest(found, exact, doc_embeds, n_docs, metric)
    if threshold is not None:
        kept &= doc_scores >= threshold
    found, doc_scores = np.where(kept, found, -1), np.where(kept, doc_scores, np.float32(-np.inf))
    order = np.lexsort((found, -doc_scores), axis=1)
    order = order[:, : int(kept.sum(axis=1).max(initial=0))]
    questions_of = np.arange(len(found))[:, None]
    rows = found[questions_of, order]
    doc_embeds = doc_embeds[questions_of, order]
    doc_embeds[rows < 0] = 0
    return Scored(rows, doc_scores[questions_of, order], doc_embeds)


def _nearest(
    found: Int64Array,
    products: npt.NDArray[np.float64],
    doc_embeds: Float32Array,
    n_docs: int,
    metric: Metric,
) -> npt.NDArray[np.bool_]:
    """Returns which of found [batch, candidates] are real and among the n_docs nearest; ties go to lower rows."""
    kept = found >= 0
    if found.shape[1] <= n_docs:
        return kept
    nearness = products
    if metric is Metric.L2:  # less the question's own square, the same for all its candidates
        nearness = 2 * products - np.square(doc_embeds, dtype=np.float64).sum(axis=2)
    order = np.lexsort((found, np.where(kept, -nearness, np.inf)), axis=1)
    best = np.zeros_like(kept)
    np.put_along_axis(best, order[:, :n_docs], True, axis=1)
    return kept & best
