"""Questions from the QAMR data set (Michael et al. 2018), and cloze questions from its sentences."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.training.data.example import Example
from demo.training.data.word_lists import listed

BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": '"',
    "''": '"',
}
CLOSE_TO_PREVIOUS = {",", *listed(". ,; ,: ,? ,! ,) ,] ,} ,%,'s,'S,n't,'re,'ve,'ll,'d,'m,'")}
CLOSE_TO_NEXT = ("-LRB-", "-LSB-", "``", "$", "£", "€", "#")
STOP_WORDS = {
    *listed(
        "the, a, an, of, in, on, at, to, and, or, is, was, were, are, be, by, for, with, that, which, as"
    ),
    *listed("from, his, her, its, their, it, he, she, they, this, these, had, has, have"),
}
MAX_ANSWER_WORDS = 12
MIN_AGREEMENT = 0.5
QUESTION_WORDS = {
    "name": ("who", "what", "which", "where", "what"),
    "year": ("when", "what year", "in what year"),
    "number": ("how many", "how much", "what number"),
    "words": ("what", "what", "which", "how"),
}


@dataclass(frozen=True)
class Sentence:
    """A sentence: its words as given, its running text, and each word's character span in that."""

    words: list[str]
    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Asked:
    """A question about a sentence, answered by its words first..last."""

    sentence: str
    question: str
    first: int
    last: int


def join_words(words: list[str]) -> Sentence:
    """Undo the tokenisation of the Penn Treebank."""
    text, spans = "", []
    for i, word in enumerate(words):
        shown = BRACKETS.get(word, word)
        tight = shown in CLOSE_TO_PREVIOUS or word == "''" or (i > 0 and words[i - 1] in CLOSE_TO_NEXT)
        text += " " if text and not tight else ""
        spans.append((len(text), len(text) + len(shown)))
        text += shown
    return Sentence(words, text, spans)


def read_sentences(folder: Path) -> dict[str, Sentence]:
    """Read the sentences by their id."""
    lines = (folder / "wiki-sentences.tsv").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines)
    return {name: join_words(words.split(" ")) for name, words in pairs}


def agreed_answer(columns: list[str]) -> tuple[int, ...] | None:
    """Return the word indices that the writer and the two validators agree on best, or None."""
    answers = [tuple(sorted(set(map(int, columns[6].split()))))]
    for column in columns[7:9]:
        indices = column.partition(":")[2].split()
        if indices and all(index.isdigit() for index in indices):
            answers.append(tuple(sorted(set(map(int, indices)))))
    answers = [answer for answer in answers if answer]
    if len(answers) < 2:
        return None

    def agreement(answer: tuple[int, ...]) -> float:
        overlaps = (2 * len(set(answer) & set(other)) / (len(answer) + len(other)) for other in answers)
        return (sum(overlaps) - 1) / (len(answers) - 1)

    best = max(answers, key=lambda answer: (agreement(answer), -len(answer)))
    whole = best[-1] - best[0] + 1 == len(best) <= MAX_ANSWER_WORDS
    return best if whole and agreement(best) >= MIN_AGREEMENT else None


def read_questions(folder: Path, sentences: dict[str, Sentence]) -> list[Asked]:
    """Read the questions whose answer is agreed on and is one stretch of words."""
    asked = []
    for name in ("filtered_dev.tsv", "filtered_test.tsv"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            columns = line.split("\t")
            sentence = sentences.get(columns[0])
            answer = agreed_answer(columns)
            if sentence is not None and answer is not None and answer[-1] < len(sentence.words):
                asked.append(Asked(columns[0], columns[5].strip(), answer[0], answer[-1]))
    return asked


class Qamr:
    """Draws examples from a checkout of the QAMR data set: sentences joined to passages, and questions."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        self.sentences = read_sentences(folder)
        self.names = sorted(self.sentences)
        self.questions = read_questions(folder, self.sentences)
        self.rng.shuffle(self.questions)
        self.position = 0

    def example(self, max_others: int) -> Example:
        """Return the next question with a passage of its sentence and up to max_others others."""
        asked = self.questions[self.position % len(self.questions)]
        self.position += 1
        return self.passage(asked.sentence, asked.first, asked.last, asked.question, max_others)

    def passage(self, name: str, first: int, last: int, question: str, max_others: int) -> Example:
        """Return the example whose answer is words first..last of the named sentence."""
        others = self.rng.sample(self.names, self.rng.randint(0, max_others))
        names = [name, *(other for other in others if other != name)]
        title = self.title([self.sentences[item].words for item in names])
        self.rng.shuffle(names)
        text, begin = "", 0
        for item in names:
            text += " " if text else ""
            begin = len(text) if item == name else begin
            text += self.sentences[item].text
        spans = self.sentences[name].spans
        return Example(title, text, question, begin + spans[first][0], begin + spans[last][1])

    def title(self, sentences: list[list[str]]) -> str:
        """Return a title: mostly a name of one of the sentences."""
        if self.rng.random() < 0.15:
            return self.rng.choice(("news", "history", "article", "notes"))
        words = self.rng.choice(sentences) if self.rng.random() < 0.4 else sentences[0]
        names = [" ".join(words[i : min(j, i + 4)]) for i, j in capitalised(words)]
        return self.rng.choice(names) if names else "notes"

    def cloze(self, max_others: int) -> Example:
        """Return a question made by replacing some words of a sentence by a question word."""
        while True:
            name = self.rng.choice(self.names)
            words = self.sentences[name].words
            spots = self.spots(words) if len(words) >= 8 else []
            if not spots:
                continue
            first, last, kind = self.rng.choice(spots)
            question = self.cloze_question(words, first, last, kind)
            if question is not None:
                return self.passage(name, first, last, question, max_others)

    def spots(self, words: list[str]) -> list[tuple[int, int, str]]:
        """Return the stretches of words that a question may ask for, and their kind."""
        spots = [(i, min(j, i + 5) - 1, "name") for i, j in capitalised(words) if j < len(words)]
        for i, word in enumerate(words[:-1]):
            if word[0].isdigit():
                spots.append((i, i, "year" if re.fullmatch(r"1\d{3}|20\d\d", word) else "number"))
        for _ in range(2):
            i = self.rng.randint(1, len(words) - 3)
            j = min(len(words) - 2, i + self.rng.randint(0, 2))
            if all(words[k].isalpha() and words[k].lower() not in STOP_WORDS for k in (i, j)):
                spots.append((i, j, "words"))
        return spots

    def cloze_question(self, words: list[str], first: int, last: int, kind: str) -> str | None:
        """Return a rough question for words first..last, or None where too little context is left."""
        rng = self.rng
        drop = rng.choice((0.0, 0.15, 0.35))

        def thinned(context: list[str]) -> list[str]:
            kept = (word for word in context if word not in BRACKETS and word not in ",.;:")
            return [w for w in kept if rng.random() > drop * (1.6 if w in STOP_WORDS else 0.6)]

        left = thinned(words[max(0, first - rng.randint(2, 9)) : first])
        right = thinned(words[last + 1 : last + 1 + rng.randint(2, 9)])
        asks = [rng.choice(QUESTION_WORDS[kind])]
        question = rng.choice((asks + right, asks + right + left, left + asks + right, asks + left))
        if sum(word.lower() not in STOP_WORDS for word in question) < 3:
            return None
        return " ".join(question) + ("?" if rng.random() < 0.8 else "")


def capitalised(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return the stretches [i, j) of capitalised words, without the sentence's first word."""
    stretches, i = [], 1
    while i < len(words):
        j = i
        while j < len(words) and words[j][0].isupper() and words[j] not in BRACKETS:
            j += 1
        if j > i:
            stretches.append((i, j))
        i = max(j, i + 1)
    return stretches
