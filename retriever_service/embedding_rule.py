"""Which embeddings an index takes: one rule for what is built and for what is upserted."""

from dataclasses import dataclass

import numpy as np

from retriever_service.types import MAX_NORM, Float32Array

_UNIT_TOLERANCE = 1e-2  # what float16 or bfloat16 leaves of a unit vector


@dataclass(frozen=True, slots=True)
class Refused:
    """The first vector that is not taken, why not, and its length."""

    position: int
    reason: str
    length: float


def first_refused(embeddings: Float32Array, *, unit: bool = False) -> Refused | None:
    """Checks float32 [n, dim]: finite, not zero, at most MAX_NORM long, and of length 1 where `unit`."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    rules = [
        (~np.isfinite(lengths), "is not finite"),
        (lengths > MAX_NORM, f"is longer than {MAX_NORM:g}"),
        (lengths == 0, "is zero: no question can find it by its score"),
    ]
    if unit:
        rules.insert(
            2, (np.abs(lengths - 1) > _UNIT_TOLERANCE, "is not of length 1, as the index's embeddings are")
        )
    wrong = np.any([broken for broken, _ in rules], axis=0)
    if not wrong.any():
        return None
    position = int(np.argmax(wrong))
    reason = next(reason for broken, reason in rules if broken[position])
    return Refused(position, reason, float(lengths[position]))
