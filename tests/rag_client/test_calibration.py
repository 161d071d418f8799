"""Bins and the expected calibration error, on predictions made by hand."""

import random

import pytest

from rag_client.calibration import calibration


def test_bins_hold_their_means_and_the_error_is_their_weighted_gap() -> None:
    found = calibration([0.1, 0.15, 0.95, 1.0], [False, True, True, True])
    assert [(one.low, one.high, one.count) for one in found.bins] == [(0.1, 0.2, 2), (0.9, 1.0, 2)]
    assert [one.mean_probability for one in found.bins] == pytest.approx([0.125, 0.975])
    assert [one.share_true for one in found.bins] == [0.5, 1.0]
    assert found.expected_error == pytest.approx((2 * 0.375 + 2 * 0.025) / 4)


def test_predictions_that_come_true_as_often_as_they_say_have_no_error() -> None:
    rng = random.Random(0)
    probabilities = [rng.random() for _ in range(20_000)]
    honest = calibration(probabilities, [rng.random() < p for p in probabilities])
    boasting = calibration(probabilities, [rng.random() < p / 2 for p in probabilities])
    assert honest.expected_error < 0.02
    assert boasting.expected_error == pytest.approx(0.25, abs=0.02)


def test_nothing_predicted_is_no_error() -> None:
    assert calibration([], []).expected_error == 0.0
    assert calibration([], []).bins == []
