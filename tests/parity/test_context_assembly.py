"""Contexts are Hugging Face's: RagRetriever.postprocess_docs, token for token, up to padding."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import RagRetriever

from retriever_service.context import long_texts
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.encoder import ContextParts
from retriever_service.context.tokenizer import ContextTokenizer, QuestionTokenizer
from retriever_service.types import Contexts, Truncation
from tests.retriever_service.tiny_models import (
    WORDS,
    bpe_tokenizer,
    tiny_config,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

TOKENIZERS = {
    "wordpiece": wordpiece_tokenizer,
    "wordpiece-cased": lambda: wordpiece_tokenizer(lowercase=False),
    "bpe": bpe_tokenizer,
    "unigram": unigram_tokenizer,
}
SEPARATORS = [
    (" / ", " // "),
    (" / ", "//  "),
    (": ", "  - q:  "),
    ("", ""),
    ("  ", " "),
    (" [SEP] ", "</s>"),
    ("\n", " \n "),
]

PIECES = st.one_of(
    st.sampled_from(
        [*WORDS, '"', '""', " ", "  ", "   ", "/", "//", "[SEP]", "</s>", "<pad>", "\t", "\n", "'", "-"]
    ),
    st.text(max_size=6),
    st.sampled_from(
        ["é", "e\u0301", "ß", "中文", "日本", "🦉", "👩‍🔬", "\u200b", "\u00a0", "\ufeff", "ﬁ", "İ", "\x00"]
    ),
)
TEXT = st.lists(PIECES, max_size=30).map("".join)
TITLE = st.one_of(TEXT, TEXT.map(lambda text: f'"{text}"'), TEXT.map(lambda text: f'"{text}'))
PREFIX = st.one_of(st.none(), st.just(""), st.sampled_from(["question: ", " ", '"', "  a  "]), TEXT)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def hugging_face(tokenizer: Any, documents: Any, questions: Any, prefix: Any, **config: Any) -> Any:
    """Calls RagRetriever.postprocess_docs itself, with no index behind it."""
    retriever = SimpleNamespace(config=tiny_config(**config), generator_tokenizer=tokenizer)
    docs = [
        {"title": [title for title, _ in found], "text": [text for _, text in found]} for found in documents
    ]
    return RagRetriever.postprocess_docs(
        retriever, docs, questions, prefix, len(documents[0]), return_tensors="np"
    )


def ours(tokenizer: Any, documents: Any, questions: Any, prefix: Any, **config: Any) -> Contexts:
    length = config.pop("max_combined_length")
    truncation = config.pop("truncation", Truncation.QUESTION_LAST)
    assembler = ContextAssembler(ContextTokenizer(tokenizer), **config, prefix="")
    caching = ContextAssembler(ContextTokenizer(tokenizer), **config, prefix="", cache_bytes=1 << 20)
    parts = [
        ContextParts(title, text, question)
        for found, question in zip(documents, questions, strict=True)
        for title, text in found
    ]
    contexts, *cached = (
        one.assemble(parts, max_combined_length=length, truncation=truncation, prefix=prefix)
        for one in (assembler, caching, caching)
    )
    for others in cached:
        np.testing.assert_array_equal(others.input_ids, contexts.input_ids)
        np.testing.assert_array_equal(others.attention_mask, contexts.attention_mask)
        np.testing.assert_array_equal(others.question_cut, contexts.question_cut)
    return contexts


def assert_equal_up_to_padding(contexts: Contexts, expected: Any, pad_token_id: int) -> None:
    ids, mask = expected
    width = contexts.input_ids.shape[1]
    assert width == int(mask.sum(axis=1).max())
    np.testing.assert_array_equal(contexts.input_ids, ids[:, :width])
    np.testing.assert_array_equal(contexts.attention_mask, mask[:, :width])
    assert (ids[:, width:] == pad_token_id).all()
    assert contexts.input_ids.dtype == contexts.attention_mask.dtype == np.int64


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    documents=st.lists(st.lists(st.tuples(TITLE, TEXT), min_size=2, max_size=2), min_size=1, max_size=3),
    question=TEXT,
    prefix=PREFIX,
    separators=st.sampled_from(SEPARATORS),
    max_combined_length=st.integers(4, 80),
)
def test_question_last_is_postprocess_docs(
    tokenizer: Any,
    documents: Any,
    question: str,
    prefix: str | None,
    separators: Any,
    max_combined_length: int,
) -> None:
    questions = [f"{question}{number}" for number in range(len(documents))]
    config = {
        "title_sep": separators[0],
        "doc_sep": separators[1],
        "max_combined_length": max_combined_length,
    }
    expected = hugging_face(tokenizer, documents, questions, prefix, **config)
    contexts = ours(tokenizer, documents, questions, prefix, **config)
    assert_equal_up_to_padding(contexts, expected, tokenizer.pad_token_id)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    title=TITLE, text=TEXT, question=TEXT, separators=st.sampled_from(SEPARATORS), length=st.integers(4, 60)
)
def test_keep_question_is_postprocess_docs_where_all_fits_and_keeps_the_question_where_not(
    tokenizer: Any, title: str, text: str, question: str, separators: Any, length: int
) -> None:
    config = {"title_sep": separators[0], "doc_sep": separators[1]}
    arguments = (tokenizer, [[(title, text)]], [question], None)
    whole_ids, whole_mask = hugging_face(*arguments, **config, max_combined_length=2000)
    whole = whole_ids[0][whole_mask[0] == 1].tolist()
    contexts = ours(*arguments, **config, max_combined_length=length, truncation=Truncation.KEEP_QUESTION)
    kept = contexts.input_ids[0].tolist()
    if len(whole) <= length:
        assert kept == whole
        assert not contexts.question_cut[0]
        return
    assert len(kept) == length
    framed = ContextTokenizer(tokenizer)
    assert kept[: len(framed.bos_ids)] == framed.bos_ids
    assert kept[len(kept) - len(framed.eos_ids) :] == framed.eos_ids
    if not contexts.question_cut[0]:
        # A document's beginning, then all that stood from the question's separator on.
        head = next(at for at in range(length + 1) if at == length or kept[at] != whole[at])
        tail = length - head
        assert kept[length - tail :] == whole[len(whole) - tail :]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    title=TITLE,
    text=st.lists(PIECES, min_size=20, max_size=80).map(" ".join),
    question=TEXT,
    separators=st.sampled_from(SEPARATORS),
    length=st.integers(4, 20),
)
def test_a_document_without_its_middle_is_postprocess_docs(
    tokenizer: Any, title: str, text: str, question: str, separators: Any, length: int
) -> None:
    """Of a document longer than a context the middle is not tokenized; here, wherever that can be proven."""
    config = {"title_sep": separators[0], "doc_sep": separators[1], "max_combined_length": length}
    arguments = (tokenizer, [[(title, text)]], [question], None)
    whole = ours(*arguments, **config, truncation=Truncation.KEEP_QUESTION)
    with pytest.MonkeyPatch.context() as eager:
        eager.setattr(long_texts, "_CHARACTERS_A_TOKEN", 0)
        kept = ours(*arguments, **config, truncation=Truncation.KEEP_QUESTION)
        contexts = ours(*arguments, **config)
    np.testing.assert_array_equal(kept.input_ids, whole.input_ids)
    np.testing.assert_array_equal(kept.question_cut, whole.question_cut)
    assert_equal_up_to_padding(contexts, hugging_face(*arguments, **config), tokenizer.pad_token_id)


@pytest.mark.parametrize("separators", SEPARATORS)
def test_keep_question_cuts_only_the_document(tokenizer: Any, separators: Any) -> None:
    text, question = " ".join(WORDS), "where is the old stone bridge ?"
    config = {"title_sep": separators[0], "doc_sep": separators[1], "truncation": Truncation.KEEP_QUESTION}
    alone = len(tokenizer(separators[1] + question)["input_ids"])
    contexts = ours(tokenizer, [[("river", text)]], [question], None, max_combined_length=alone + 8, **config)
    assert not contexts.question_cut[0]
    kept = contexts.input_ids[0].tolist()
    # Byte-level BPE gives the first word other ids where a space stands before it: compare from the second on.
    asked = tokenizer(question.removeprefix("where"), add_special_tokens=False)["input_ids"]
    assert kept[-1 - len(asked) : -1] == asked
    assert tokenizer.decode(kept, skip_special_tokens=True).startswith("river")


def test_question_longer_than_the_context_is_cut_on_the_right_and_reported(tokenizer: Any) -> None:
    config = {"title_sep": " / ", "doc_sep": " // ", "max_combined_length": 12}
    question = " ".join(WORDS)
    contexts = ours(
        tokenizer, [[("t", "text")]], [question], None, truncation=Truncation.KEEP_QUESTION, **config
    )
    assert contexts.question_cut.tolist() == [True]
    tail = tokenizer(" // " + question)["input_ids"]
    assert contexts.input_ids[0].tolist() == [*tail[:11], tail[-1]]


@pytest.mark.parametrize("make", [wordpiece_tokenizer, bpe_tokenizer])
def test_question_input_ids_are_decoded_as_hugging_face_decodes_them(make: Any) -> None:
    tokenizer = make()
    texts = ["Where  IS the [SEP] River ?", "", "who was king"]
    ids = tokenizer(texts, padding=True, return_tensors="np")["input_ids"]
    assert QuestionTokenizer(tokenizer).decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
