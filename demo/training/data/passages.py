"""Training questions about the corpus's "seen" passages, with names and figures exchanged for invented ones.

A model that has met a passage could answer from memory. So most draws replace the capitalised words and the
figures of passage, question and answer alike: what stays is the prose, and copying is all that helps.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from demo.training.data import word_lists as words
from demo.training.data.example import Example
from demo.training.data.names import Names

WORD = re.compile(r"[A-Z][a-z]+(?:'s)?")
FIGURE = re.compile(r"\d[\d,.]*\d|\d")
INSIDE = re.compile(r"(?<=[\w,;:'\"(] )[A-Z][a-z]+")
"""A capitalised word inside a sentence: most likely a name."""

KEPT_WORDS = {
    *words.LISTS["month"],
    *words.listed(
        "Celsius, Mount, Lake, Sea, River, Ocean, King, Queen, Prize, Nobel, Bridge, Tower, Museum"
    ),
    *words.listed("Castle, Hills, Street"),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Passages:
    """Draws questions about passages; three of four draws are about a renamed copy."""

    def __init__(self, rng: random.Random, names: Names, corpus: Path, questions: Path) -> None:
        self.rng = rng
        self.names = names
        self.passages = {row["key"]: row for row in read_rows(corpus)}
        self.questions = read_rows(questions)

    def example(self) -> Example:
        """Return a question with its passage."""
        while True:
            row = self.rng.choice(self.questions)
            passage = self.passages[row["key"]]
            title, text, question, answer = passage["title"], passage["text"], row["question"], row["answer"]
            if self.rng.random() < 0.75:
                title, text, question, answer = self.renamed([title, text, question, answer])
            places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text)]
            if places:
                return Example(title, text, question, places[0], places[0] + len(answer))

    def renamed(self, texts: list[str]) -> list[str]:
        """Return the texts with names and figures exchanged, each in the same way everywhere."""
        share = self.rng.choice((0.3, 0.7, 1.0))
        names = {name for text in texts[:2] for name in INSIDE.findall(text)} | set(WORD.findall(texts[0]))
        exchanged: dict[str, str] = {}

        def word(match: re.Match[str]) -> str:
            found = match[0].removesuffix("'s")
            if found not in exchanged:
                keep = found in KEPT_WORDS or found not in names or self.rng.random() > share
                exchanged[found] = found if keep else self.names.word()
            return exchanged[found] + match[0][len(found) :]

        def figure(match: re.Match[str]) -> str:
            found = match[0]
            if found not in exchanged:
                exchanged[found] = found if self.rng.random() > share else self.figure(found)
            return exchanged[found]

        return [FIGURE.sub(figure, WORD.sub(word, text)) for text in texts]

    def figure(self, found: str) -> str:
        """Return a figure of the same shape; years stay likely years."""
        if re.fullmatch(r"1\d{3}|20\d\d", found):
            return str(self.rng.randint(1100, 2023))
        digits = [self.rng.choice("123456789") if c.isdigit() else c for c in found]
        return "".join(digits)
