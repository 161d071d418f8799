"""Answers are compared as SQuAD compares them, whatever spaces a tokenizer's decoding leaves."""

import pytest

from rag_client.evaluation import exact_match, f1, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Nile.", "nile"),
        ("1, 012 km", "1012 km"),
        ("1,012 km", "1012 km"),
        ("2. 4 metres", "24 metres"),
        ("rose - red", "rosered"),
        ("levi ' s", "levis"),
        ("Zürich", "zurich"),
        ("", ""),
    ],
)
def test_normalize_answer_ignores_case_articles_punctuation_and_spacing(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_accepts_any_of_the_answers() -> None:
    assert exact_match("the mud", ["clay", "Mud"])
    assert not exact_match("mud brick", ["clay", "mud"])
    assert not exact_match("mud", [])


def test_f1_counts_common_words_against_the_best_answer() -> None:
    assert f1("lake gatun", ["Gatun Lake"]) == 1.0
    assert f1("gatun", ["Gatun Lake", "Panama"]) == pytest.approx(2 / 3)
    assert f1("Paris", ["Rome"]) == 0.0
    assert f1("", [""]) == 1.0
    assert f1("x", []) == 0.0
