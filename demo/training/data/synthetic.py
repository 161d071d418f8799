"""Synthetic encyclopedic passages about invented things, with questions: the tables are facts/*.txt.

A table starts with "@ kind name [the] | pronouns", lists its slots as ": slot=value kind ...", its sentences
as "- ...", and its questions as "? slot asked for | wording | wording ...". {e} in a sentence is the name of
the thing, {s} its name or a pronoun, and {slot} a value. The slot "e" asks for the thing itself.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo.training.data.example import Example
from demo.training.data.names import Names

FACTS_DIR = Path(__file__).parents[1] / "facts"
MARK = re.compile(r"\{(\w+)\}")

FILLERS = (
    "It attracts many visitors every year.",
    "Historians still argue about the details.",
    "Several books have been written on the subject.",
    "Little else is known about those years.",
    "Opinions on this differ.",
    "Many people supported the decision at the time.",
    "The details were recorded only much later.",
)


@dataclass
class Table:
    """What can be said and asked about one kind of thing."""

    kind: str
    name_kind: str
    article: bool
    pronouns: list[str]
    slots: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)


def read_tables(folder: Path = FACTS_DIR) -> list[Table]:
    """Read all tables of the folder and check that their marks name slots."""
    tables: list[Table] = []
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("@ "):
                head, pronouns = line[2:].split("|")
                kind, name_kind, *rest = head.split()
                tables.append(
                    Table(kind, name_kind, rest == ["the"], [p.strip() for p in pronouns.split(",")])
                )
            elif line.startswith(": "):
                pairs = (entry.partition("=") for entry in line[2:].split())
                tables[-1].slots.update((slot, kind) for slot, _, kind in pairs)
            elif line.startswith("- "):
                tables[-1].sentences.append(line[2:])
            elif line.startswith("? "):
                slot, *wordings = [part.strip() for part in line[2:].split("|")]
                tables[-1].questions += [(slot, wording) for wording in wordings]
    for table in tables:
        known = {"e", "s", *table.slots}
        used = {mark for line in table.sentences for mark in MARK.findall(line)}
        used |= {mark for slot, wording in table.questions for mark in (slot, *MARK.findall(wording))}
        if used - known:
            raise ValueError(f"table {table.kind}: no such slots: {sorted(used - known)}")
    return tables


@dataclass
class Paragraph:
    """Rendered sentences about one thing: the text and the first place of every value in it."""

    table: Table
    values: dict[str, str]
    text: str = ""
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


class Synthesizer:
    """Composes examples from the tables. Each is new: names and numbers are drawn afresh."""

    def __init__(
        self, rng: random.Random, vocabulary: Sequence[str], tables: list[Table] | None = None
    ) -> None:
        self.rng = rng
        self.names = Names(rng, vocabulary)
        self.tables = read_tables() if tables is None else tables

    def example(self, max_sentences: int) -> Example:
        """Return an example whose passage has about max_sentences sentences at most."""
        while True:
            table = self.rng.choice(self.tables)
            main = self.paragraph(table, self.rng.randint(1, min(max_sentences, 6)))
            asked = self.question(main)
            if asked is not None:
                break
        others = self.others(table, max_sentences)
        place = self.rng.randint(0, len(others)) if self.rng.random() < 0.6 else 0
        before = "".join(other.text + " " for other in others[:place])
        after = "".join(" " + other.text for other in others[place:])
        question, (start, end) = asked
        title = main.values["e"] if self.rng.random() < 0.85 or not others else others[0].values["e"]
        return Example(title, before + main.text + after, question, len(before) + start, len(before) + end)

    def others(self, table: Table, max_sentences: int) -> list[Paragraph]:
        """Return paragraphs about other things, often of the same kind: they mislead."""
        roll = self.rng.random()
        number = 0 if roll < 0.5 else 1 if roll < 0.85 else 2
        return [
            self.paragraph(
                table if self.rng.random() < 0.75 else self.rng.choice(self.tables),
                self.rng.randint(1, max(1, max_sentences // 2)),
            )
            for _ in range(number)
        ]

    def paragraph(self, table: Table, num_sentences: int) -> Paragraph:
        """Return a paragraph whose first sentence names its thing."""
        values = {slot: self.names.value(kind) for slot, kind in table.slots.items()}
        values["e"] = self.names.value(table.name_kind)
        paragraph = Paragraph(table, values)
        chosen = self.rng.sample(table.sentences, min(num_sentences, len(table.sentences)))
        named = [s for s in table.sentences if "{e}" in s or "{s}" in s]
        if chosen[0] not in named:
            chosen[0] = self.rng.choice(named)
        for position, sentence in enumerate(dict.fromkeys(chosen)):
            self.render(paragraph, sentence, first=position == 0)
            if self.rng.random() < 0.04:
                paragraph.text += " " + self.rng.choice(FILLERS)
        return paragraph

    def render(self, paragraph: Paragraph, template: str, first: bool) -> None:
        """Append the sentence to the paragraph and note where each value stands first."""
        text = paragraph.text + " " if paragraph.text else ""
        begin = len(text)
        for part in re.split(r"(\{\w+\})", template):
            if not MARK.fullmatch(part):
                text += part
                continue
            slot = part[1:-1]
            value = paragraph.values["e" if slot == "s" else slot]
            if slot == "s":
                if first or self.rng.random() < 0.4:
                    text += "the " if paragraph.table.article else ""
                    slot = "e"
                else:
                    value = self.rng.choice(paragraph.table.pronouns)
            if slot != "s":
                paragraph.spans.setdefault(slot, (len(text), len(text) + len(value)))
            text += value
        paragraph.text = text[:begin] + text[begin].upper() + text[begin + 1 :]

    def question(self, paragraph: Paragraph) -> tuple[str, tuple[int, int]] | None:
        """Return a question that the paragraph answers and the answer's span, or None if there is none."""
        spans = paragraph.spans
        fitting = [
            (slot, wording)
            for slot, wording in paragraph.table.questions
            if slot in spans and all(mark == "e" or mark in spans for mark in MARK.findall(wording))
        ]
        if not fitting:
            return None
        slots = sorted({slot for slot, _ in fitting})
        weights = [0.5 if slot == "e" else 1.0 for slot in slots]
        wanted = self.rng.choices(slots, weights)[0]
        slot, wording = self.rng.choice([pair for pair in fitting if pair[0] == wanted])
        question = MARK.sub(lambda match: paragraph.values[match[1]], wording)
        if self.rng.random() < 0.05:
            question = question.rstrip("?")
        return question, self.with_article(paragraph, spans[slot])

    def with_article(self, paragraph: Paragraph, span: tuple[int, int]) -> tuple[int, int]:
        """Return the span without a leading "the ": answers are compared without articles anyway."""
        start, end = span
        return (start + 4, end) if paragraph.text[start:end].lower().startswith("the ") else span
