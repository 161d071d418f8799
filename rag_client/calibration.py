"""Whether probabilities are what they say: of what is given p, does a share p come true (Guo et al. 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions from low to high: how many, their mean probability, and the share that came true."""

    low: float
    high: float
    count: int
    mean_probability: float
    share_true: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Bins that hold predictions, and the expected calibration error: the mean gap of a bin, weighted by its count."""

    bins: list[Bin]
    count: int
    expected_error: float


def calibration(
    probabilities: Sequence[float], outcomes: Sequence[bool], num_bins: int = NUM_BINS
) -> Calibration:
    """Bins of equal width over [0, 1]; a probability on a border counts to the bin above it, 1 to the last."""
    held: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for probability, outcome in zip(probabilities, outcomes, strict=True):
        held[min(int(probability * num_bins), num_bins - 1)].append((probability, outcome))
    bins = [
        Bin(
            low=index / num_bins,
            high=(index + 1) / num_bins,
            count=len(pairs),
            mean_probability=sum(p for p, _ in pairs) / len(pairs),
            share_true=sum(o for _, o in pairs) / len(pairs),
        )
        for index, pairs in enumerate(held)
        if pairs
    ]
    count = len(probabilities)
    gaps = sum(one.count * abs(one.mean_probability - one.share_true) for one in bins)
    return Calibration(bins, count, gaps / count if count else 0.0)
