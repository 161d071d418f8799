"""Families without a decoder of our own are run by transformers, and BART and T5 too where that is asked for."""

from __future__ import annotations

import random

import pytest

from generator_service.types import Strategy
from tests.parity import cases, engine, oracle
from tests.parity.tiny_models import tiny_rag

OWN = ["bart", "t5-pad3", "t5-gated", "mt5"]
OTHERS = ["pegasus", "marian"]


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("case", range(3))
def test_general_path_answers_as_our_decoder(case: int, family: str, strategy: Strategy) -> None:
    rag = tiny_rag(family, case)
    general = tiny_rag(family, case, decoder="general").backbone
    assert (rag.backbone.name, general.name) == (
        family.split("-", maxsplit=1)[0].replace("mt5", "t5"),
        "general",
    )
    batch = cases.random_batch(rag, case, n_docs=1 + case, size=2)
    settings = cases.random_settings(rag, 4000 + case)
    own = engine.answers_to(engine.new_runner(rag.backbone), engine.requests_of(batch, settings, strategy))
    ours = engine.answers_to(engine.new_runner(general), engine.requests_of(batch, settings, strategy))
    theirs = [[oracle.Answer(oracle.trimmed(h.token_ids, settings), h.score) for h in q] for q in own]
    engine.assert_same(ours, theirs, settings)


@pytest.mark.parametrize("case", range(16))
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_answer_as_transformers_in_rag_token(family: str, case: int) -> None:
    rng = random.Random(case)
    rag = tiny_rag(family, case % 3)
    assert rag.backbone.name == "general"
    batch = cases.random_batch(rag, case, n_docs=rng.randint(1, 4), size=rng.randint(1, 3))
    settings = cases.random_settings(rag, 5000 + case)
    theirs = oracle.rag_token(rag.token, batch, settings)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("case", range(12))
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_answer_as_transformers_in_rag_sequence(family: str, case: int) -> None:
    rng = random.Random(case)
    rag = tiny_rag(family, case % 3)
    n_docs = rng.randint(1, 4)
    settings = cases.random_settings(rag, 6000 + case)
    ragged = not cases.reads_pads(settings)
    batch = cases.random_batch(rag, case, n_docs=n_docs, size=rng.randint(1, 2), ragged=ragged)
    rag.set_n_docs(n_docs)
    theirs = oracle.rag_sequence(rag.mathematical, batch, settings, masked=True)
    requests = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)
