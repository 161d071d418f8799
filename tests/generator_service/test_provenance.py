"""Spans of documents in contexts, runs of attention, and the arithmetic of leaving documents out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from generator_service.provenance import Provenance, TokenSource, best_run, leave_one_out, locate
from generator_service.tokenization import TextTokenizer
from generator_service.types import Strategy, Trace
from tests.integration.tiny_pair import tokenizer as word_pieces


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each character, and two for beginnings of words, as BART's byte pairs have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "Ġp", "Ġl"]
    merges = [("Ġ", "p"), ("Ġ", "l")]
    backend = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module", params=["word-pieces", "byte-level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (word_pieces() if request.param == "word-pieces" else byte_level()).save_pretrained(folder)
    return TextTokenizer(str(folder))


def covered(context: str, text: str, tokenizer: TextTokenizer) -> str:
    """The characters of text that tokens of a context stand for."""
    encoded = tokenizer.encode_with_offsets(context)
    assert encoded is not None
    places = [place for place in locate(encoded[0], text, tokenizer) if place is not None]
    for (_, end), (start, _) in itertools.pairwise(places):
        assert end <= start
    marked = {index for start, end in places for index in range(start, end)}
    return "".join(character if index in marked else " " for index, character in enumerate(text))


def test_text_is_found_behind_its_title_and_before_the_question(tokenizer: TextTokenizer) -> None:
    text = "paris lies on a river"
    found = covered(f"paris / {text} // where lies paris", text, tokenizer)
    assert found.split() == text.split()


def test_text_of_an_empty_title_is_found(tokenizer: TextTokenizer) -> None:
    text = "paris lies"
    assert covered(f" / {text} // paris lies where", text, tokenizer).split() == text.split()


def test_text_cut_short_is_found_as_far_as_it_goes(tokenizer: TextTokenizer) -> None:
    found = covered("paris / paris lies on // who", "paris lies on a river", tokenizer)
    assert found.rstrip().split() == ["paris", "lies", "on"]


def test_doubled_spaces_are_made_one_in_contexts_and_counted_in_texts(tokenizer: TextTokenizer) -> None:
    text = "paris  lies   on  a river"
    squeezed = f"paris / {text} // where".replace("  ", " ")
    assert covered(squeezed, text, tokenizer).split() == ["paris", "lies", "on", "a", "river"]


def test_first_word_grown_together_with_a_separator_is_left_out_alone(tokenizer: TextTokenizer) -> None:
    """A separator without a space behind it: the tokens of the rest are still found."""
    found = covered("x/paris lies on // w", "paris lies on", tokenizer).split()
    assert found[-2:] == ["lies", "on"]


def test_text_that_is_not_there_is_not_found(tokenizer: TextTokenizer) -> None:
    assert covered("abc", "xyz", tokenizer).strip() == ""
    assert covered("abc", "", tokenizer) == ""


def test_run_is_the_best_of_all_that_are_short_enough() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 20):
        weights = rng.random(length).astype(np.float32) ** 4
        start, end = best_run(weights, 4)
        assert 0 < end - start <= 4
        runs = [(s, e) for s in range(length) for e in range(s + 1, min(s + 4, length) + 1)]
        best = max((weights[s:e] - weights.mean()).sum() for s, e in runs)
        assert (weights[start:end] - weights.mean()).sum() == pytest.approx(best, abs=1e-6)
    assert best_run(np.array([0, 0, 0.5, 0, 0], np.float32)) == (2, 3)


def test_equal_weights_give_one_token() -> None:
    assert best_run(np.full(6, 0.25, np.float32)) == (0, 1)


def trace(log_probs: list[list[float]]) -> Trace:
    table = np.array(log_probs, "<f4")
    return Trace(token_log_probs=table.tobytes(), token_posterior=table.tobytes(), cross_attention=[])


def test_leaving_out_renormalises_the_priors() -> None:
    log_probs, scores = [[-1.0, -2.0, -3.0], [-0.5, -0.25, -4.0]], [0.0, 1.0, 2.0]
    prior = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    kept = [prior[0] / (prior[0] + prior[2]), prior[2] / (prior[0] + prior[2])]
    by_token = leave_one_out(trace(log_probs), scores, Strategy.RAG_TOKEN)
    assert by_token.log_likelihood == pytest.approx(
        sum(math.log(sum(p * math.exp(x) for p, x in zip(prior, row, strict=True))) for row in log_probs)
    )
    assert by_token.without[1] == pytest.approx(
        sum(math.log(kept[0] * math.exp(a) + kept[1] * math.exp(c)) for a, _, c in log_probs)
    )
    whole = leave_one_out(trace(log_probs), scores, Strategy.RAG_SEQUENCE)
    assert whole.without[1] == pytest.approx(math.log(kept[0] * math.exp(-1.5) + kept[1] * math.exp(-7.0)))


def test_the_only_document_cannot_be_left_out() -> None:
    assert leave_one_out(trace([[-1.0]]), [3.0], Strategy.RAG_TOKEN).without == [None]


def test_documents_that_are_not_there_keep_their_places() -> None:
    source = TokenSource(5, "x", 1, 0.75, None, 0, 1, 0.5)
    wide = Provenance(np.array([[0.25, 0.75]], np.float32), [source]).over([0, 2], 3)
    assert wide.token_posterior.tolist() == [[0.25, 0.0, 0.75]]
    assert wide.tokens[0].document == 2
