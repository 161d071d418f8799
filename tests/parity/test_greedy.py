"""Greedy search against transformers, which processes raw logits in RAG-Sequence, mixtures in RAG-Token."""

from __future__ import annotations

import random
from typing import Any

import pytest

from generator_service.types import Compatibility, GenerationSettings, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.tiny_models import TinyRag, tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "mt5"]


def greedy_settings(rag: TinyRag, case: int, **fixed: Any) -> GenerationSettings:
    neutral = {"length_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1}
    return cases.random_settings(rag, case, **(neutral | fixed))


@pytest.mark.parametrize("case", range(60))
def test_rag_token_greedy_answers_as_transformers(case: int) -> None:
    rng = random.Random(case)
    rag = tiny_rag(FAMILIES[case % len(FAMILIES)], seed=rng.randrange(3))
    batch = cases.random_batch(rag, case, n_docs=rng.randint(1, 6), size=rng.randint(1, 4))
    settings = greedy_settings(rag, 2000 + case)

    theirs = oracle.rag_token(rag.token, batch, settings)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("compatibility", list(Compatibility))
@pytest.mark.parametrize("case", range(40))
def test_rag_sequence_greedy_answers_as_transformers(case: int, compatibility: Compatibility) -> None:
    rng = random.Random(case)
    rag = tiny_rag(("bart", "t5", "t5-gated", "t5-pad3")[case % 4], seed=rng.randrange(3))
    n_docs = rng.randint(1, 6)
    masked = compatibility is Compatibility.MASKED
    settings = greedy_settings(rag, 3000 + case)
    ragged = not (masked and cases.reads_pads(settings))
    batch = cases.random_batch(rag, case, n_docs=n_docs, size=rng.randint(1, 3), ragged=ragged)
    rag.set_n_docs(n_docs)

    theirs = oracle.rag_sequence(rag.mathematical if masked else rag.sequence, batch, settings, masked=masked)
    requests = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE, compatibility=compatibility)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "penalties",
    [{"repetition_penalty": 1.6}, {"repetition_penalty": 0.6}, {"encoder_repetition_penalty": 1.7}],
    ids=",".join,
)
def test_rag_token_with_one_document_penalises_log_probabilities(
    family: str, seed: int, penalties: dict[str, float]
) -> None:
    """Penalties are no softmax invariants, and RAG-Token's scores are log-probabilities for one document too."""
    rag = tiny_rag(family, seed)
    batch = cases.random_batch(rag, 40 + seed, n_docs=1, size=1)
    settings = cases.plain_settings(rag, max_length=12, **penalties)
    theirs = oracle.rag_token(rag.token, batch, settings)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)
