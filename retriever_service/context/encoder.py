"""Contexts as token ids, each document tokenized once where the tokenizer allows it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retriever_service.bounded_cache import BoundedCache
from retriever_service.context.long_texts import LongTexts
from retriever_service.context.splitting import Splitting, splits_before
from retriever_service.context.tokenizer import ContextTokenizer
from retriever_service.types import Int64Array

_OBJECTS_BYTES = 500
"""What Python's objects around a document's texts and tokens take, about."""


@dataclass(frozen=True, slots=True)
class ContextParts:
    """What one context is made of, before it is put together."""

    title: str
    text: str
    question: str


@dataclass(slots=True)
class _DocumentTokens:
    """Ids int64 of prefix, title, text and what of doc_sep stands before the border, or of what is kept of them.

    `num_document` counts those that end before doc_sep begins; None until somebody asked.
    """

    text: str
    separator_start: int
    ids: Int64Array
    num_document: int | None = None


_Key = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class EncodedContext:
    """A context's ids int64, without the special tokens around them; of a long one those that can be kept."""

    ids: Int64Array
    joined: tuple[str, int] | None
    document: _DocumentTokens | None


class ContextEncoder:
    """Encodes prefix + title + title_sep + text + doc_sep + question, double spaces made one, as Hugging Face does.

    Where the tokenizer gives both sides of a space in doc_sep the tokens that it gives the whole, the side before
    it is kept by its own text, in up to `cache_bytes`, and only the question is encoded. Else, and for a question
    for which that is not proven, the whole is. Of a long document only what a context can keep is encoded.
    """

    def __init__(self, tokenizer: ContextTokenizer, title_sep: str, doc_sep: str, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._title_sep = title_sep
        self._doc_sep = doc_sep
        border = _border(doc_sep)
        self._before, self._behind = doc_sep[:border], doc_sep[border:]
        self._splitting = Splitting.NEVER
        if border and cache_bytes:
            self._splitting = tokenizer.splittings[doc_sep[border - 1]]
        self._long_texts = LongTexts(tokenizer)
        self._cache: BoundedCache[_Key, _DocumentTokens] = BoundedCache(cache_bytes)

    def join(self, part: ContextParts, prefix: str) -> tuple[str, int]:
        """Returns the context as text, and the character at which doc_sep and the question begin."""
        document = self._document(part, prefix)
        joined = (document + self._doc_sep + part.question).replace("  ", " ")
        # Pairs of spaces collapse from the left, so what stands before a place decides how far it moves.
        return joined, len(document.replace("  ", " "))

    def encode(self, parts: Sequence[ContextParts], prefix: str, num_tokens: int) -> list[EncodedContext]:
        """Returns the ids of each context.

        Those of a context with more than `num_tokens` may be its first `num_tokens`, some that follow, and then all
        that reach past the document.
        """
        questions = self._questions(parts)
        whole = [
            self._long_texts.shortened(*self.join(part, prefix), num_tokens)
            for part in parts
            if part.question not in questions
        ]
        encoded = iter(self._encode([joined for joined, _ in whole]))
        joins = iter(whole)
        split = [part for part in parts if part.question in questions]
        documents = iter(self._documents(split, prefix, num_tokens))
        contexts = []
        for part in parts:
            question = questions.get(part.question)
            if question is None:
                contexts.append(EncodedContext(next(encoded), next(joins), None))
            else:
                document = next(documents)
                contexts.append(EncodedContext(np.concatenate((document.ids, question)), None, document))
        return contexts

    def question_starts(self, contexts: Sequence[EncodedContext]) -> list[int]:
        """Returns for each context its first token that reaches past the document: into doc_sep or the question.

        Takes the tokens' places in the text, which costs more than their ids.
        """
        asked: list[tuple[str, int]] = []
        for context in contexts:
            if context.joined is not None:
                asked.append(context.joined)
            elif context.document is not None and context.document.num_document is None:
                asked.append((context.document.text, context.document.separator_start))
        encodings = iter(self._tokenizer.encode([text for text, _ in asked]) if asked else [])
        places = iter(asked)
        starts = []
        for context in contexts:
            document = context.document
            if document is not None and document.num_document is not None:
                starts.append(document.num_document)
                continue
            start = _first_past(next(encodings).offsets, next(places)[1])
            if document is not None:
                document.num_document = start
            starts.append(start)
        return starts

    def _document(self, part: ContextParts, prefix: str) -> str:
        title = part.title.removeprefix('"').removesuffix('"')
        return prefix + title + self._title_sep + part.text

    def _questions(self, parts: Sequence[ContextParts]) -> dict[str, Int64Array]:
        """Returns the ids behind the border of each question for which they can be told alone."""
        rights = {}
        for question in dict.fromkeys(part.question for part in parts):
            right = (self._behind + question).replace("  ", " ")
            if splits_before(self._splitting, right):
                rights[question] = right
        return dict(zip(rights, self._encode(list(rights.values())), strict=True))

    def _documents(
        self, parts: Sequence[ContextParts], prefix: str, num_tokens: int
    ) -> list[_DocumentTokens]:
        # A long document is kept once for each number of tokens that it may have been shortened to.
        longest = self._long_texts.longest(num_tokens) - len(prefix) - len(self._title_sep)
        keys = [
            (prefix, one.title, one.text, num_tokens if len(one.text) + len(one.title) > longest else 0)
            for one in parts
        ]
        known = self._cache.get_all(keys)
        absent = {key: part for key, part, found in zip(keys, parts, known, strict=True) if found is None}
        if not absent:
            return [found for found in known if found is not None]
        made = {}
        lefts = [self._left(part, prefix, num_tokens) for part in absent.values()]
        encoded = self._encode([left for left, _ in lefts])
        for key, (left, separator_start), ids in zip(absent, lefts, encoded, strict=True):
            made[key] = _DocumentTokens(left, separator_start, ids)
        self._cache.put_all([(key, document, _size(key, document)) for key, document in made.items()])
        return [found or made[key] for key, found in zip(keys, known, strict=True)]

    def _left(self, part: ContextParts, prefix: str, num_tokens: int) -> tuple[str, int]:
        """Returns what stands before the border, as far as it is needed, and where doc_sep begins in it."""
        document = self._document(part, prefix)
        left = (document + self._before).replace("  ", " ")
        return self._long_texts.shortened(left, len(document.replace("  ", " ")), num_tokens)

    def _encode(self, texts: Sequence[str]) -> list[Int64Array]:
        ids = self._tokenizer.encode_ids(texts) if texts else []
        return [np.asarray(one, dtype=np.int64) for one in ids]


def _border(doc_sep: str) -> int:
    """Returns the place of the last space of doc_sep that follows a printable ASCII character; 0 for none."""
    places = (place for place in range(len(doc_sep) - 1, 0, -1) if doc_sep[place] == " ")
    return next((place for place in places if "!" <= doc_sep[place - 1] <= "~"), 0)


def _first_past(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Returns the first token that ends behind the character; all of them where none does."""
    ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    behind = np.flatnonzero(ends > character)
    return int(behind[0]) if len(behind) else len(ends)


def _size(key: _Key, document: _DocumentTokens) -> int:
    return _OBJECTS_BYTES + sum(map(sys.getsizeof, (*key, document.text))) + document.ids.nbytes
