"""A text and its two parts get the same tokens wherever `splitting` says so."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from retriever_service.context.splitting import Splitting, splits_before, splitting_of
from tests.retriever_service.tiny_models import (
    WORDS,
    bpe_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

PIECES = st.one_of(
    st.sampled_from([*WORDS, " ", "  ", "   ", "/", "//", "'s", "'", "\t", "\n", "\r\n", "▁", "12", "-"]),
    st.sampled_from(["<mask>", "</s>", "<extra_id_0>", "[SEP]", "<pad>", "<extra", "_id_0>", "[", "<", ">"]),
    st.sampled_from(
        ["é", "e\u0301", "\u0301", "ำ", "中文", "🦉", "👩‍🔬", "🏽", "\u200b", "\u200d", "\u00a0", "\u00b4"]
    ),
    st.sampled_from(
        ["\x00", "\u3000", "\ufeff", "ﬁ", "İ", "Σ", "ς", "\u0600", "ﾞ", "½", "한", "\u1100", "\u1161"]
    ),
    st.text(max_size=4),
)
TEXT = st.lists(PIECES, max_size=12).map("".join)


def bart() -> Tokenizer:
    """With BART's <mask>, which takes the spaces before it along."""
    backend = bpe_tokenizer().backend_tokenizer
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return backend


def t5() -> Tokenizer:
    """With SentencePiece's own normalization, as T5's converter lays it out, and T5's sentinels."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    parsed = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    backend = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in parsed.pieces], unk_id=0))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(parsed.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    sentinel = AddedToken("<extra_id_0>", lstrip=True, rstrip=True, special=True)
    backend.add_special_tokens(["</s>", "<pad>", sentinel])
    return backend


def t5_old() -> Tokenizer:
    backend = t5()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    return backend


BACKENDS: dict[str, tuple[Callable[[], Tokenizer], Splitting]] = {
    "bart": (bart, Splitting.ALWAYS),
    "bpe": (lambda: bpe_tokenizer().backend_tokenizer, Splitting.ALWAYS),
    "t5": (t5, Splitting.BEFORE_ASCII),
    "t5-old": (t5_old, Splitting.BEFORE_ASCII),
    "unigram": (lambda: unigram_tokenizer().backend_tokenizer, Splitting.BEFORE_ASCII),
    "wordpiece": (lambda: wordpiece_tokenizer().backend_tokenizer, Splitting.BEFORE_ASCII),
}


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> tuple[Tokenizer, Splitting]:
    make, splitting = BACKENDS[request.param]
    made = make()
    made.no_truncation()
    made.no_padding()
    return made, splitting


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    left=TEXT, right=TEXT, first=st.sampled_from(["a", "W", "1", "<", "'", "["]), end=st.sampled_from("/:?x")
)
def test_both_parts_have_the_tokens_and_places_of_the_whole(
    backend: tuple[Tokenizer, Splitting], left: str, right: str, first: str, end: str
) -> None:
    tokenizer, expected = backend
    splitting = splitting_of(tokenizer, end)
    assert splitting is expected
    left += end
    for behind in (f" {right}", f" {first}{right}"):
        if not splits_before(splitting, behind):
            continue
        whole = tokenizer.encode(left + behind, add_special_tokens=False)
        before = tokenizer.encode(left, add_special_tokens=False)
        assert before.ids + tokenizer.encode(behind, add_special_tokens=False).ids == whole.ids
        assert whole.offsets[: len(before.ids)] == before.offsets


def test_whatever_is_not_known_to_work_piece_by_piece_is_not_split() -> None:
    def changed(**parts: Any) -> Tokenizer:
        backend = bpe_tokenizer().backend_tokenizer
        for name, part in parts.items():
            setattr(backend, name, part)
        return backend

    greedy, spaced = changed(), changed()
    greedy.add_special_tokens([AddedToken("<sep/", rstrip=True, special=True)])
    spaced.add_special_tokens([AddedToken("/ a", special=True)])
    bad = [
        greedy,
        spaced,
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)),
        changed(pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
        changed(pre_tokenizer=None),
        changed(normalizer=normalizers.Prepend("▁")),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace(" ", "")),
        changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁")])),
        changed(model=models.BPE(dropout=0.5)),
    ]
    assert [splitting_of(one, "/") for one in bad] == [Splitting.NEVER] * len(bad)
    assert splitting_of(greedy, ":") is Splitting.ALWAYS
    assert [splitting_of(changed(), end) for end in (" ", "é", "\n")] == [Splitting.NEVER] * 3


def test_second_part_begins_with_a_space_and_where_need_be_ascii() -> None:
    texts = [" a", " é", "  a", " ", "", "a"]
    assert [splits_before(Splitting.ALWAYS, text) for text in texts] == [True, True, True, True, False, False]
    assert [splits_before(Splitting.BEFORE_ASCII, text) for text in texts] == [True, *[False] * 5]
    assert not any(splits_before(Splitting.NEVER, text) for text in texts)
