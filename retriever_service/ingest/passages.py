"""Cuts documents into passages of whole sentences, about as long as the paper's 100 words."""

import dataclasses
import re
from collections.abc import Iterator

import sentencex

from retriever_service.errors import BuildError
from retriever_service.ingest.records import MAX_KEY_BYTES, Record, checked_size

DEFAULT_WORDS = 100
# A Han or kana character counts as a word, and so do 24 characters of a script that puts no spaces.
_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\s぀-ヿ㐀-鿿豈-﫿]{1,24}")


def split_record(record: Record, words: int, language: str, max_text_bytes: int) -> Iterator[Record]:
    """Yields the passages of a record, with its title and metadata; their keys are key#1, key#2, …

    Raises BuildError for a record with an embedding, which is the whole text's, for a passage that is longer
    than max_text_bytes, and for a key that its number makes too long.
    """
    if record.embedding is not None:
        raise BuildError(f"{record.where}: has an embedding, which passages of its text cannot share")
    for number, text in enumerate(split_text(record.text, words, language), start=1):
        where = f"{record.where}, passage {number}"
        key = f"{record.key}#{number}"
        checked_size(key, "key", where, MAX_KEY_BYTES)
        checked_size(text, "text", where, max_text_bytes)
        yield dataclasses.replace(record, where=where, key=key, text=text)


def split_text(text: str, words: int, language: str = "en") -> Iterator[str]:
    """Yields passages of at most `words` words that end where a sentence ends; together they are the text.

    A sentence that is longer alone is cut after a word. `language` is an ISO 639 code; sentencex knows its
    abbreviations, and falls back on a language near it.
    """
    passage: list[str] = []
    room = words
    for piece in _pieces(text, words, language):
        size = len(_WORD.findall(piece))
        if size > room and passage:
            yield from _stripped(passage)
            passage, room = [], words
        passage.append(piece)
        room -= size
    yield from _stripped(passage)


def _pieces(text: str, words: int, language: str) -> Iterator[str]:
    """Yields sentences, and parts of those that are too long, white space included."""
    for sentence in sentencex.segment(language, text):
        start = 0
        ends = [match.end() for match in _WORD.finditer(sentence)]
        for end in ends[words - 1 : -1 : words]:
            yield sentence[start:end]
            start = end
        yield sentence[start:]


def _stripped(passage: list[str]) -> Iterator[str]:
    text = "".join(passage).strip()
    if text:
        yield text
