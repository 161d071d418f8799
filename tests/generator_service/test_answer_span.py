"""Answers found again in their documents, in the documents' own spelling."""

from __future__ import annotations

import pytest

from generator_service import answer_span


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("1, 012 km", "The river is 1,012 km long.", "1,012 km"),
        ("paris", "Its capital is Paris.", "Paris"),
        ("sao tome", "the island of São Tomé lies", "São Tomé"),
        ("st. john's", "It is called St. John's today", "St. John's"),
        ("iron", "Environment and iron.", "iron"),
        ("Au", "Gold (au is not it) has the symbol Au.", "Au"),
    ],
)
def test_span_restores_case_spacing_and_accents(answer: str, text: str, found: str) -> None:
    span = answer_span.find(answer, [text], [""], [1.0])
    assert span is not None
    assert span.text == found
    assert text[span.start : span.end] == found


def test_span_is_taken_from_the_likeliest_document() -> None:
    span = answer_span.find("rome", ["Rome is old.", "He saw Rome."], ["", ""], [0.2, 0.8])
    assert span is not None
    assert (span.document, span.start) == (1, 7)


def test_span_falls_back_to_titles() -> None:
    span = answer_span.find("marie curie", ["She found it."], ["Marie Curie"], [1.0])
    assert span == answer_span.Span(0, 0, 11, "Marie Curie", in_title=True)


@pytest.mark.parametrize("answer", ["", "  ", "iro", "gold"])
def test_no_span_where_no_whole_words_match(answer: str) -> None:
    assert answer_span.find(answer, ["Iron and irony."], ["Iron"], [1.0]) is None
