"""Of a long text only what a context can keep is tokenized, where that provably changes no token of it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.encoder import ContextParts
from retriever_service.context.long_texts import LongTexts
from retriever_service.context.tokenizer import ContextTokenizer
from retriever_service.types import Contexts, Truncation
from tests.retriever_service.tiny_models import WORDS, bpe_tokenizer, unigram_tokenizer, wordpiece_tokenizer

MAKES = [bpe_tokenizer, unigram_tokenizer, wordpiece_tokenizer]
LONG = " ".join(WORDS * 3000)
QUESTION = "where is the old bridge ?"


class Counting(ContextTokenizer):
    """Counts the characters that it tokenizes."""

    num_characters = 0

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Counts, and encodes."""
        self.num_characters += sum(map(len, texts))
        return super().encode_ids(texts)


def assembled(tokenizer: ContextTokenizer, text: str, **settings: Any) -> Contexts:
    assembler = ContextAssembler(
        tokenizer, title_sep=" / ", doc_sep=" // ", prefix="", cache_bytes=settings.pop("cache_bytes", 0)
    )
    parts = [ContextParts("title", text, QUESTION)]
    return assembler.assemble(parts, **{"max_combined_length": 300} | settings)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 24])
@pytest.mark.parametrize("truncation", list(Truncation))
def test_a_long_document_costs_what_its_context_does_and_gives_the_same(
    make: Callable[[], Any], cache_bytes: int, truncation: Truncation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of a megabyte were tokenized whole for contexts of 300 tokens."""
    tokenizer = Counting(make())
    found = assembled(tokenizer, LONG, cache_bytes=cache_bytes, truncation=truncation)
    assert tokenizer.num_characters < 20_000 < len(LONG)
    monkeypatch.setattr(LongTexts, "shortened", lambda self, text, tail_start, num_tokens: (text, tail_start))
    whole = assembled(tokenizer, LONG, cache_bytes=cache_bytes, truncation=truncation)
    np.testing.assert_array_equal(found.input_ids, whole.input_ids)
    np.testing.assert_array_equal(found.question_cut, whole.question_cut)


def test_a_document_that_is_kept_for_short_contexts_is_none_for_longer_ones() -> None:
    tokenizer = ContextTokenizer(bpe_tokenizer())
    assembler = ContextAssembler(tokenizer, title_sep=" / ", doc_sep=" // ", prefix="", cache_bytes=1 << 24)
    parts = [ContextParts("title", LONG, QUESTION)]
    for length in (20, 3000, 20, 300):
        found = assembler.assemble(parts, max_combined_length=length)
        whole = assembled(tokenizer, LONG, max_combined_length=length)
        np.testing.assert_array_equal(found.input_ids, whole.input_ids)


@pytest.mark.parametrize("size", range(325, 345))
def test_a_document_about_as_long_as_what_is_left_whole_is_none_for_longer_contexts(size: int) -> None:
    tokenizer = ContextTokenizer(bpe_tokenizer())
    assembler = ContextAssembler(tokenizer, title_sep=" / ", doc_sep=" // ", prefix="", cache_bytes=1 << 24)
    parts = [ContextParts("title", ("a b " * 100)[: size - 1] + "a", QUESTION)]
    for length in (tokenizer.num_special_tokens + 20, 300):
        found = assembler.assemble(parts, max_combined_length=length)
        whole = assembled(tokenizer, parts[0].text, max_combined_length=length)
        np.testing.assert_array_equal(found.input_ids, whole.input_ids)


@pytest.mark.parametrize(
    "text",
    ["\u4e2d" * 20_000, "x" * 20_000, "\u0434\u0430 " * 10_000, "a b" + "x" * 20_000],
    ids=["no space", "one word", "no ASCII", "one border"],
)
def test_a_text_without_two_proven_borders_is_left_whole(text: str) -> None:
    texts = LongTexts(ContextTokenizer(wordpiece_tokenizer()))
    assert texts.shortened(text, len(text), 100) == (text, len(text))


def test_a_head_that_has_too_few_tokens_is_made_longer() -> None:
    tokenizer = ContextTokenizer(wordpiece_tokenizer())
    text = ("\u200b" * 98 + "a b ") * 2000  # what BERT's normalizer takes away makes no token
    shortened, tail_start = LongTexts(tokenizer).shortened(text, len(text), 100)
    assert 5_000 < len(shortened) < len(text) / 2
    assert tail_start == len(shortened)
    assert tokenizer.encode_ids([shortened])[0][:100] == tokenizer.encode_ids([text])[0][:100]


def test_a_text_of_a_few_contexts_is_not_looked_at() -> None:
    texts = LongTexts(None)  # type: ignore[arg-type]
    assert texts.shortened("word " * 900, 4500, 300) == ("word " * 900, 4500)
