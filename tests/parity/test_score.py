"""Scores of given targets against the loss of forward(labels=...)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from generator_service.engine.messages import ScoreTarget
from generator_service.types import Compatibility, QuestionScore, Strategy
from tests.parity import cases, engine
from tests.parity.oracle import Batch
from tests.parity.tiny_models import VOCAB_SIZE, TinyRag, tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "mt5"]


def random_labels(rag: TinyRag, rng: random.Random, size: int, *, bos: Sequence[bool]) -> list[list[int]]:
    """Targets of different lengths, begun as the model begins them, padded at the end."""
    labels = []
    for i in range(size):
        start = [rag.decoder_start_token_id]
        if bos[i] and rag.bos_token_id is not None:
            start.append(rag.bos_token_id)
        labels.append(start + [cases.word(rng) for _ in range(rng.randint(1, 6))] + [rag.eos_token_id])
    longest = max(len(row) for row in labels)
    return [row + [rag.pad_token_id] * (longest - len(row)) for row in labels]


def targets_of(
    rag: TinyRag,
    batch: Batch,
    labels: list[list[int]],
    strategy: Strategy,
    *,
    exclude_first: bool = False,
    compatibility: Compatibility = Compatibility.HF,
) -> list[ScoreTarget]:
    return [
        ScoreTarget(
            request_id=engine.new_id(),
            strategy=strategy,
            compatibility=compatibility,
            contexts=question.contexts,
            doc_scores=question.doc_scores,
            labels=row,
            pad_token_id=rag.pad_token_id,
            exclude_first=exclude_first,
        )
        for question, row in zip(batch.questions, labels, strict=True)
    ]


def forward(model: Any, batch: Batch, labels: list[list[int]], **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**batch.tensors(), labels=torch.tensor(labels), n_docs=batch.n_docs, **arguments)
    return outputs.loss


def loss_of(score: QuestionScore, epsilon: float) -> float:
    return (1 - epsilon) * score.nll_loss + epsilon / VOCAB_SIZE * score.smooth_loss


def smoothed(model: Any, epsilon: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(model.config, "label_smoothing", epsilon)
    return model


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_docs", range(1, 7))
def test_rag_token_loss_is_that_of_forward(
    n_docs: int, family: str, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(n_docs)
    rag = tiny_rag(family, n_docs % 3)
    size = rng.randint(1, 4)
    batch = cases.random_batch(rag, 70 + n_docs, n_docs=n_docs, size=size)
    labels = random_labels(rag, rng, size, bos=[True] * size)
    model = smoothed(rag.token, epsilon, monkeypatch)
    expected = forward(model, batch, labels, reduce_loss=False)

    scores = engine.score(rag.backbone, targets_of(rag, batch, labels, Strategy.RAG_TOKEN))
    losses = torch.tensor([loss_of(s, epsilon) for s in scores])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)
    reduced = forward(model, batch, labels, reduce_loss=True)
    torch.testing.assert_close(losses.sum(), reduced, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("exclude_bos_score", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_docs", range(1, 7))
def test_rag_sequence_loss_is_that_of_forward(
    n_docs: int, family: str, exclude_bos_score: bool, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(n_docs)
    rag = tiny_rag(family, n_docs % 3)
    size = rng.randint(1, 4)
    batch = cases.random_batch(rag, 80 + n_docs, n_docs=n_docs, size=size)
    bos = [n_docs % 2 == 0 or i % 2 == 0 for i in range(size)]
    labels = random_labels(rag, rng, size, bos=bos)
    model = smoothed(rag.sequence, epsilon, monkeypatch)
    arguments = {"exclude_bos_score": exclude_bos_score}
    expected = forward(model, batch, labels, reduce_loss=False, **arguments)

    all_begin = rag.bos_token_id is not None and all(row[1] == rag.bos_token_id for row in labels)
    targets = targets_of(
        rag, batch, labels, Strategy.RAG_SEQUENCE, exclude_first=exclude_bos_score and all_begin
    )
    losses = torch.tensor([loss_of(s, epsilon) for s in engine.score(rag.backbone, targets)])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)
    reduced = forward(model, batch, labels, reduce_loss=True, **arguments)
    torch.testing.assert_close(losses.sum(), reduced, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("compatibility", list(Compatibility))
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_target_keeps_its_prior_unless_transformers_is_asked_for(
    family: str, compatibility: Compatibility
) -> None:
    """transformers puts the prior on the second position, and loses it where that is a pad."""
    rag = tiny_rag(family, 1)
    batch = cases.random_batch(rag, 5, n_docs=4, size=2)
    labels = [[rag.decoder_start_token_id, rag.eos_token_id]] * 2
    masked = compatibility is Compatibility.MASKED
    expected = forward(rag.mathematical if masked else rag.sequence, batch, labels, reduce_loss=False)
    targets = targets_of(rag, batch, labels, Strategy.RAG_SEQUENCE, compatibility=compatibility)
    losses = torch.tensor([s.nll_loss for s in engine.score(rag.backbone, targets)])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", FAMILIES)
def test_trailing_pads_of_a_target_change_nothing(family: str, strategy: Strategy) -> None:
    rag = tiny_rag(family, 0)
    batch = cases.random_batch(rag, 5, n_docs=2, size=1)
    labels = [[rag.decoder_start_token_id, 9, 8, 7, rag.eos_token_id]]
    padded = [labels[0] + [rag.pad_token_id] * 3]
    (short,) = engine.score(rag.backbone, targets_of(rag, batch, labels, strategy))
    (long,) = engine.score(rag.backbone, targets_of(rag, batch, padded, strategy))
    assert short.nll_loss == pytest.approx(long.nll_loss, rel=1e-5, abs=1e-5)
    assert short.smooth_loss == pytest.approx(long.smooth_loss, abs=1e-3)
    assert short.document_posterior == pytest.approx(long.document_posterior, abs=1e-5)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", FAMILIES)
def test_score_of_an_answer_is_the_likelihood_it_was_given_with(family: str, strategy: Strategy) -> None:
    rag = tiny_rag(family, 0)
    batch = cases.random_batch(rag, 9, n_docs=4, size=1)
    settings = cases.plain_settings(rag, num_beams=4, num_return_sequences=4, max_length=8)
    requests = engine.requests_of(batch, settings, strategy)
    (hypotheses,) = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for hypothesis in hypotheses:
        labels = [list(hypothesis.token_ids)]
        targets = targets_of(rag, batch, labels, strategy, compatibility=Compatibility.MASKED)
        (score,) = engine.score(rag.backbone, targets)
        assert score.log_likelihood == pytest.approx(hypothesis.log_likelihood, abs=1e-4)
        assert score.document_posterior == pytest.approx(hypothesis.document_posterior, abs=1e-4)
        assert sum(score.document_posterior) == pytest.approx(1.0, abs=1e-5)
