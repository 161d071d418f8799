"""The kernels that find the best tokens, run by Triton's interpreter on the CPU, against torch and the plain path."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from generator_service.decoding import logits_processors, marginalize, top_tokens
from generator_service.decoding.picks import Pick, Picks
from generator_service.engine.request import Request
from generator_service.types import Hypothesis, Strategy
from tests.parity import cases, engine
from tests.parity.tiny_models import TinyRag, tiny_rag

pytest.importorskip("triton")
top_kernels = pytest.importorskip("generator_service.decoding.top_kernels")

CPU = torch.device("cpu")


def sorted_tokens(
    logits: Tensor, lse: Tensor, priors: Tensor | None, picks: list[Pick], keep: int, num_out: int
) -> tuple[Tensor, Tensor]:
    """What best_tokens promises, in torch, row by row."""
    values = torch.full((num_out, keep), float("-inf"))
    ids = torch.zeros((num_out, keep), dtype=torch.int64)
    for pick in picks:
        docs = 1 if priors is None else priors.shape[1]
        rows = torch.arange(docs) * pick.step + pick.first
        log_probs = (logits[rows].float() - lse[rows, None])[:, None]
        scores = log_probs[0]
        if priors is not None:
            scores = marginalize.rag_token_mixture(log_probs, priors[pick.search])
        scores[0, list(pick.banned)] = float("-inf")
        best, order = scores[0].sort(descending=True, stable=True)
        values[pick.out], ids[pick.out] = best[:keep], order[:keep]
    return values, ids


def random_picks(rng: random.Random, docs: int, vocab: int) -> tuple[int, int, list[Pick]]:
    """Rows of the logits, of the output, and picks of five searches of one to four rows; some outputs are nobody's."""
    first, out, picks = 0, 0, []
    for search in range(5):
        rows = rng.randint(1, 4)
        banned = tuple(rng.sample(range(vocab), rng.choice([0, 0, 1, 3])))
        picks += [Pick(first + row, rows, search, out + row, banned) for row in range(rows)]
        first, out = first + docs * rows, out + rows + 1
    rng.shuffle(picks)
    return first, out, picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 61, 1024, 1025, 5003])
def test_logsumexp_is_torch_s(vocab: int, dtype: torch.dtype) -> None:
    logits = (20 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    logits[0, : vocab // 2] = float("-inf")
    logits[1, 3] = 90.0
    found = top_kernels.logsumexp(logits)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, logits.float().logsumexp(-1), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("docs", [1, 2, 5])
@pytest.mark.parametrize("vocab", [7, 61, 1024, 2051])
def test_best_tokens_are_those_of_the_mixture(vocab: int, docs: int, dtype: torch.dtype) -> None:
    """Documents that do not count, tokens of no probability, banned tokens, rows of no search."""
    rng, random_ = random.Random(vocab * docs), torch.Generator().manual_seed(vocab)
    rows, num_out, picks = random_picks(rng, docs, vocab)
    logits = (4 * torch.randn(rows, vocab, generator=random_)).to(dtype)
    logits[torch.rand(logits.shape, generator=random_) < 0.1] = float("-inf")
    priors = None
    if docs > 1:
        scores = torch.randn(5, docs, generator=random_)
        scores[2, 0] = float("-inf")
        priors = marginalize.doc_log_prior(scores)
    lse = logits.float().logsumexp(-1)
    keep = min(vocab, 6)
    expected = sorted_tokens(logits, lse, priors, picks, keep, num_out)
    found = top_kernels.best_tokens(logits, lse, priors, Picks.of(picks, CPU), keep, num_out)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    # scores that differ by rounding alone may stand in either order: bfloat16 has few values
    gaps = (expected[0][:, 1:] - expected[0][:, :-1]).abs() < 1e-5
    close = torch.zeros(found[1].shape, dtype=torch.bool)
    close[:, 1:] |= gaps
    close[:, :-1] |= gaps
    close[:, -1] = True  # beyond the last may stand one that is as good
    same = found[1] == expected[1]
    assert bool((same | close).all())
    assert same.float().mean() > (0.9 if dtype is torch.float32 else 0.5)


@pytest.mark.parametrize("docs", [1, 3])
def test_of_equal_tokens_the_lowest_come_first(docs: int) -> None:
    """Over the tiles' edges too: all tokens alike, two alike in different tiles, and none of any probability."""
    vocab = 2 * top_kernels.TOP_TILE + 17
    logits = torch.zeros(3 * docs, vocab)
    logits[docs : 2 * docs, [5, vocab - 2, top_kernels.TOP_TILE + 1]] = 8.0
    logits[2 * docs :, 4:] = float("-inf")
    picks = [Pick(row * docs, 1, row, row) for row in range(3)]
    priors = None if docs == 1 else torch.zeros(3, docs).log_softmax(-1)
    lse = top_kernels.logsumexp(logits)
    values, ids = top_kernels.best_tokens(logits, lse, priors, Picks.of(picks, CPU), 6, 3)
    assert ids.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, top_kernels.TOP_TILE + 1, vocab - 2, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]
    assert values[2, 4:].isneginf().all()
    assert values[2, :4].isfinite().all()
    # chains take torch's argmax, which is the lowest of equals too
    assert ids[:, 0].tolist() == logits[::docs].argmax(-1).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_banned_tokens_are_what_the_processors_forbid(seed: int) -> None:
    """Where banned_tokens answers, the processors do that and nothing more."""
    rag = tiny_rag("bart")
    settings = cases.random_settings(rag, seed, do_sample=False)
    processors = logits_processors.build(settings, [torch.tensor([5, 6])], CPU)
    processors += logits_processors.build_warpers(settings, CPU)
    answered = 0
    for cur_len in range(1, settings.max_length):
        banned = logits_processors.banned_tokens(settings, cur_len)
        if banned is None:
            continue
        answered += 1
        scores = torch.randn(2, 61)
        expected = scores.clone()
        expected[:, list(banned)] = float("-inf")
        for processor in processors:
            scores = processor(torch.randint(4, 61, (2, cur_len)), scores)
        assert torch.equal(scores, expected)
    rewrites = (
        settings.no_repeat_ngram_size,
        settings.encoder_no_repeat_ngram_size,
        settings.bad_words_ids,
        settings.renormalize_logits,
        settings.repetition_penalty != 1.0,
        settings.encoder_repetition_penalty != 1.0,
    )
    assert bool(answered) != any(rewrites) or settings.max_length <= 3


@pytest.fixture
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernels on the CPU; how many rows each call found tokens for."""
    counts: list[int] = []
    best_tokens = top_kernels.best_tokens

    def counted(
        logits: Tensor, lse: Tensor, priors: Tensor | None, picks: Picks, keep: int, num_out: int
    ) -> tuple[Tensor, Tensor]:
        counts.append(picks.table.shape[0])
        found: tuple[Tensor, Tensor] = best_tokens(logits, lse, priors, picks, keep, num_out)
        return found

    monkeypatch.setattr(top_tokens, "has_kernels", lambda _device: True)
    monkeypatch.setattr(top_kernels, "best_tokens", counted)
    return counts


def mixed_crowd(rag: TinyRag, seed: int) -> list[Request]:
    """Questions that the kernels answer, others that need processors, and sampled ones, in the same pools."""
    requests: list[Request] = []
    for index in range(8):
        number = 100 * seed + index
        batch = cases.random_batch(rag, number, n_docs=1 + number % 3, size=1)
        fixed = {"num_beams": 3, "max_length": 6 + index % 3, "do_sample": index == 7}
        settings = cases.random_settings(rag, number, **fixed)
        if index < 3:
            settings = cases.plain_settings(rag, **fixed, min_length=index, forced_eos_token_id=2)
        requests += engine.requests_of(batch, settings, list(Strategy)[number % 2])
    return requests


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("seed", range(2))
def test_answers_are_the_plain_path_s(family: str, seed: int, in_kernels: list[int]) -> None:
    rag = tiny_rag(family)
    requests = mixed_crowd(rag, seed)
    found = engine.answers_to(engine.new_runner(rag.backbone), requests)
    assert in_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_tokens, "has_kernels", lambda _device: False)
        expected = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def assert_same(ours: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.score == pytest.approx(other.score, rel=1e-5, abs=1e-5)
        assert mine.document_posterior == pytest.approx(other.document_posterior, abs=1e-5)


def test_greedy_rag_token_is_the_plain_path_s(in_kernels: list[int]) -> None:
    """Chains of one and of several documents; RAG-Sequence's stay with the raw logits."""
    rag = tiny_rag("bart")
    requests: list[Request] = []
    for index, strategy in enumerate(list(Strategy) * 3):
        settings = cases.plain_settings(rag, max_length=7, min_length=index, forced_eos_token_id=2)
        batch = cases.random_batch(rag, index, n_docs=1 + index // 2, size=1)
        requests += engine.requests_of(batch, settings, strategy)
    found = engine.answers_to(engine.new_runner(rag.backbone), requests)
    assert in_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_tokens, "has_kernels", lambda _device: False)
        expected = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_all_questions_of_a_shape_are_one_call(in_kernels: list[int]) -> None:
    """Six searches of three beams: one row each in the first step, then three."""
    rag = tiny_rag("bart")
    batch = cases.random_batch(rag, 3, n_docs=2, size=6)
    settings = cases.plain_settings(rag, num_beams=3, max_length=6, min_length=5)
    engine.answers_to(
        engine.new_runner(rag.backbone), engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    )
    assert in_kernels[:4] == [6, 18, 18, 18]


def test_too_wide_a_search_goes_the_plain_way(in_kernels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_tokens, "MAX_KEYS", 5)
    rag = tiny_rag("bart")
    requests = engine.requests_of(
        cases.random_batch(rag, 3, n_docs=2, size=1),
        cases.plain_settings(rag, num_beams=3, max_length=4),
        Strategy.RAG_TOKEN,
    )
    assert engine.answers_to(engine.new_runner(rag.backbone), requests)[0]
    assert in_kernels == []
