"""RAG-Token's beam search against RagTokenForGeneration.generate, token for token."""

from __future__ import annotations

import random

import pytest

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
