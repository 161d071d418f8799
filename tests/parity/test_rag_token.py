"""RAG-Token's beam search against RagTokenForGeneration.generate, token for token."""

from __future__ import annotations

import random

import pytest

from generator_service.model.loader import as_backbone
from generator_service.types import Strategy
from tests.parity import cases, engine, oracle
from tests.parity.tiny_models import tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "mt5", "bart-scaled"]


@pytest.mark.parametrize("case", range(180))
def test_rag_token_answers_as_transformers(case: int) -> None:
    rng = random.Random(case)
    rag = tiny_rag(FAMILIES[case % len(FAMILIES)], seed=rng.randrange(3))
    batch = cases.random_batch(rag, case, n_docs=rng.randint(1, 6), size=rng.randint(1, 4))
    settings = cases.random_settings(rag, case)

    theirs = oracle.rag_token(rag.token, batch, settings)
    ours = engine.answers_to(
        engine.new_runner(rag.backbone), engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    )
    engine.assert_same(ours, theirs, settings)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokens_too_unlikely_for_float32_are_told_apart_as_by_transformers(num_beams: int) -> None:
    rag = tiny_rag("bart", seed=1)
    batch = cases.random_batch(rag, 5, n_docs=3, size=2)
    settings = cases.plain_settings(
        rag, num_beams=num_beams, num_return_sequences=num_beams, max_length=7, min_length=3
    )
    bias = rag.generator.final_logits_bias
    before = bias.clone()
    try:
        bias[0, rag.eos_token_id] += 110.0  # forbidden at first, and certain afterwards: e^-110 is no float32
        theirs = oracle.rag_token(rag.token, batch, settings)
        runner = engine.new_runner(as_backbone(rag.generator))
        ours = engine.answers_to(runner, engine.requests_of(batch, settings, Strategy.RAG_TOKEN))
    finally:
        bias.copy_(before)
    engine.assert_same(ours, theirs, settings)
