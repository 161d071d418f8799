"""The demo's corpus and questions are well formed, and training kept away from what it must not see."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from demo.training.data.synthetic import MARK, read_tables
from rag_client.evaluation import normalize_answer

DEMO = Path(__file__).parents[2] / "demo"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def passages() -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in rows("corpus.jsonl")}


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return rows("questions.jsonl")


def test_passages_have_unique_keys_and_titles_and_at_least_320_exist() -> None:
    corpus = rows("corpus.jsonl")
    assert len(corpus) >= 320
    assert len({row["key"] for row in corpus}) == len(corpus)
    assert len({row["title"] for row in corpus}) == len(corpus)


def test_passages_are_ascii_prose_of_40_to_110_words(passages: dict[str, dict[str, Any]]) -> None:
    for row in passages.values():
        assert set(row) == {"key", "title", "text"}
        assert row["text"].isascii(), row["key"]
        assert 40 <= len(row["text"].split()) <= 110, row["key"]
        assert row["text"].endswith((".", '."', '!"')), row["key"]


def test_questions_are_unique_and_mostly_unseen(questions: list[dict[str, Any]]) -> None:
    assert len(questions) >= 300
    assert len({row["question"] for row in questions}) == len(questions)
    assert len({row["id"] for row in questions}) == len(questions)
    unseen = [row for row in questions if row["split"] == "unseen"]
    assert len(unseen) >= 160
    assert len(unseen) >= 0.55 * len(questions)


def test_every_gold_passage_contains_an_accepted_answer(
    passages: dict[str, dict[str, Any]], questions: list[dict[str, Any]]
) -> None:
    for row in questions:
        text = normalize_answer(passages[row["key"]]["text"])
        assert any(normalize_answer(answer) in text for answer in row["answers"]), row["id"]


def test_unseen_passages_are_not_trained_on(questions: list[dict[str, Any]]) -> None:
    trained = {row["key"] for row in rows("training/passages.jsonl")}
    unseen = {row["key"] for row in questions if row["split"] == "unseen"}
    seen = {row["key"] for row in questions if row["split"] == "seen"}
    assert not trained & unseen
    assert not seen & unseen
    assert seen <= trained


def test_demo_questions_are_not_trained_on(questions: list[dict[str, Any]]) -> None:
    trained = {row["question"].lower() for row in rows("training/passages.jsonl")}
    assert not trained & {row["question"].lower() for row in questions}


def test_training_answers_stand_in_their_passages(passages: dict[str, dict[str, Any]]) -> None:
    for row in rows("training/passages.jsonl"):
        assert row["answer"] in passages[row["key"]]["text"], row


def test_unseen_questions_have_no_wording_of_the_synthetic_tables(questions: list[dict[str, Any]]) -> None:
    patterns = [
        re.compile(
            "(.+)".join(re.escape(part) for part in MARK.sub("\0", wording.rstrip("?")).split("\0")),
            re.IGNORECASE,
        )
        for table in read_tables()
        for _, wording in table.questions
    ]
    for row in questions:
        if row["split"] == "unseen":
            asked = row["question"].rstrip("?")
            assert not any(pattern.fullmatch(asked) for pattern in patterns), row["id"]
