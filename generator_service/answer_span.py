"""Finds an answer in the documents it rests on: restores the case and spacing that a tokenizer lost."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """Characters start to end (one past the last) of a document's text, or of its title."""

    document: int
    start: int
    end: int
    text: str
    in_title: bool = False


def find(answer: str, texts: Sequence[str], titles: Sequence[str], posterior: Sequence[float]) -> Span | None:
    """The answer in the likeliest document that holds it, at word boundaries; None where none does."""
    if not answer:
        return None
    order = sorted(range(len(texts)), key=lambda d: -posterior[d])
    span = _find_in(answer, texts, order)
    if span is None:
        span = _find_in(answer, titles, order)
        return None if span is None else replace(span, in_title=True)
    return span


def _find_in(answer: str, texts: Sequence[str], order: Sequence[int]) -> Span | None:
    for document in order:
        text = texts[document]
        start = _bounded(text, answer)
        if start is not None:
            return Span(document, start, start + len(answer), answer)
    needle = _folded(answer)[0]
    for document in order:
        span = _find_folded(texts[document], needle)
        if span is not None:
            return Span(document, *span, texts[document][span[0] : span[1]])
    return None


def _find_folded(text: str, needle: str) -> tuple[int, int] | None:
    if not needle:
        return None
    folded, origins = _folded(text)
    at = folded.find(needle)
    while at >= 0:
        start, end = origins[at], origins[at + len(needle) - 1] + 1
        if _at_boundaries(text, start, end):
            return start, end
        at = folded.find(needle, at + 1)
    return None


def _folded(text: str) -> tuple[str, list[int]]:
    """Lower case, no accents, no white space; and where each character came from."""
    letters, origins = [], []
    for index, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).lower():
            if not part.isspace() and not unicodedata.combining(part):
                letters.append(part)
                origins.append(index)
    return "".join(letters), origins


def _bounded(text: str, answer: str) -> int | None:
    at = text.find(answer)
    while at >= 0:
        if _at_boundaries(text, at, at + len(answer)):
            return at
        at = text.find(answer, at + 1)
    return None


def _at_boundaries(text: str, start: int, end: int) -> bool:
    before = start == 0 or not (text[start - 1].isalnum() and text[start].isalnum())
    after = end == len(text) or not (text[end].isalnum() and text[end - 1].isalnum())
    return before and after
