"""What a caller is told who must come again."""

from __future__ import annotations

import pytest

from generator_service.engine.answer_rate import AnswerRate


def test_the_wait_follows_the_recent_rate_within_bounds() -> None:
    rate = AnswerRate()
    assert rate.seconds_for(5, 0.0) == 1.0
    for tenth in range(100):
        rate.count(tenth / 10)
    assert rate.per_second(10.0) == pytest.approx(10.0)
    assert rate.seconds_for(5, 10.0) == pytest.approx(0.5)
    assert rate.seconds_for(10**6, 10.0) == 30.0
    assert rate.seconds_for(1, 60.0) == 1.0, "what was answered a minute ago says nothing"


def test_the_rate_of_a_fast_engine_is_that_of_its_newest_answers() -> None:
    rate = AnswerRate()
    for thousandth in range(3000):
        rate.count(thousandth / 1000)
    assert rate.per_second(3.0) == pytest.approx(1000.0, rel=0.01)
    assert rate.seconds_for(1, 3.0) == 0.05
