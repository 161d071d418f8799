"""RAG-Sequence against RagSequenceForGeneration.generate, stock and with the mask put in."""

from __future__ import annotations

import random

import pytest

from generator_service.types import Compatibility, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.tiny_models import tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "t5-pad3", "t5-gated-pad0"]


@pytest.mark.parametrize("compatibility", list(Compatibility))
@pytest.mark.parametrize("case", range(70))
def test_rag_sequence_answers_as_transformers(case: int, compatibility: Compatibility) -> None:
    rng = random.Random(case)
    rag = tiny_rag(FAMILIES[case % len(FAMILIES)], seed=rng.randrange(3))
    n_docs = rng.randint(1, 6)
    masked = compatibility is Compatibility.MASKED
    settings = cases.random_settings(rag, 1000 + case)
    ragged = not (masked and cases.reads_pads(settings))
    batch = cases.random_batch(rag, case, n_docs=n_docs, size=rng.randint(1, 3), ragged=ragged)
    do_deduplication = rng.random() < 0.8
    rag.set_n_docs(n_docs)

    theirs = oracle.rag_sequence(
        rag.mathematical if masked else rag.sequence,
        batch,
        settings,
        masked=masked,
        do_deduplication=do_deduplication,
    )
    requests = engine.requests_of(
        batch,
        settings,
        Strategy.RAG_SEQUENCE,
        compatibility=compatibility,
        do_deduplication=do_deduplication,
    )
    ours = engine.answers_to(engine.new_runner(rag.backbone), requests)
    engine.assert_same(ours, theirs, settings)
