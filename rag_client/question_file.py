"""Questions with their accepted answers, a JSON object on each line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class QuestionFileError(ValueError):
    """The file is not there, or a line of it is no question; the message has the line's number."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its accepted answers, and the keys of the documents that hold them, where they are known."""

    question: str
    answers: list[str]
    keys: list[str] = field(default_factory=list)
    split: str = ""
    id: str = ""


def read_questions(path: Path) -> list[Question]:
    """Reads {"question": …, "answers": […]} a line, with "key" or "keys", "split" and "id" where they are there.

    Raises QuestionFileError.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionFileError(f"cannot read {path}: {error}") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise QuestionFileError(f"{path} holds no question")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise QuestionFileError(f"{path}:{number} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise QuestionFileError(f"{path}:{number} is not a JSON object")
    answers, keys = given.get("answers"), given.get("keys", [given["key"]] if given.get("key") else [])
    if not isinstance(given.get("question"), str) or not given["question"].strip():
        raise QuestionFileError(f'{path}:{number}: "question" must be a text that is not empty')
    if not _are_texts(answers) or not answers:
        raise QuestionFileError(f'{path}:{number}: "answers" must be a list of texts, at least one')
    if not _are_texts(keys):
        raise QuestionFileError(f'{path}:{number}: "keys" must be a list of texts')
    return Question(given["question"], answers, keys, str(given.get("split", "")), str(given.get("id", "")))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
