"""Sampling: a seed draws transformers' very tokens wherever transformers draws for one question alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from generator_service.types import Compatibility, GenerationSettings, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.tiny_models import TinyRag, tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "mt5"]
WARPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "all": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "epsilon_cutoff": 0.001,
        "eta_cutoff": 0.001,
        "renormalize_logits": True,
    },
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "temperature": 1.5, "min_length": 4},
    "forced": {"forced_bos_token_id": 7, "temperature": 1.3, "top_p": 0.95},
}


def sampled(rag: TinyRag, warpers: dict[str, Any], seed: int, **changes: Any) -> GenerationSettings:
    fixed = {"do_sample": True, "max_length": 10, "seed": seed, "forced_eos_token_id": rag.eos_token_id}
    return cases.plain_settings(rag, **(fixed | warpers | changes))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("warpers", WARPERS.values(), ids=WARPERS)
@pytest.mark.parametrize("case", range(4))
def test_rag_token_draws_transformers_tokens(case: int, warpers: dict[str, Any], num_beams: int) -> None:
    rag = tiny_rag(FAMILIES[case], seed=case % 3)
    batch = cases.random_batch(rag, case, n_docs=(1, 2, 5, 3)[case], size=1)
    settings = sampled(rag, warpers, 11 + case, num_beams=num_beams, num_return_sequences=num_beams)
    theirs = oracle.rag_token(rag.token, batch, settings)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("warpers", WARPERS.values(), ids=WARPERS)
@pytest.mark.parametrize("case", range(3))
def test_rag_sequence_with_one_document_draws_transformers_tokens(
    case: int, warpers: dict[str, Any], num_beams: int
) -> None:
    rag = tiny_rag(("bart", "t5-pad3", "t5-gated")[case], seed=case)
    batch = cases.random_batch(rag, case, n_docs=1, size=1)
    settings = sampled(rag, warpers, 5 + case, num_beams=num_beams)
    rag.set_n_docs(1)
    theirs = oracle.rag_sequence(rag.sequence, batch, settings, masked=False)
    requests = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE, compatibility=Compatibility.HF)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "t5-pad3", "t5-gated"])
def test_rag_sequence_draws_as_transformers_for_each_document_alone(family: str, num_beams: int) -> None:
    """transformers draws for all documents from one stream; here each has its own, seed + document."""
    rag = tiny_rag(family, 1)
    batch = cases.random_batch(rag, 3, n_docs=4, size=1)
    settings = sampled(rag, {"temperature": 1.2}, 21, num_beams=num_beams, num_return_sequences=4 * num_beams)
    arguments = oracle.generation_arguments(settings) | {"num_return_sequences": num_beams}
    candidates = set()
    for document, context in enumerate(batch.questions[0].contexts):
        torch.manual_seed(settings.seed + document)
        ids = torch.tensor([context])
        rows = rag.generator.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        candidates |= {tuple(oracle.trimmed(row, settings)) for row in rows.tolist()}

    requests = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE)
    (ours,) = engine.answers_to(engine.new_runner(rag.backbone), requests)
    assert {tuple(h.token_ids) for h in ours} == candidates


@pytest.mark.parametrize("family", FAMILIES)
def test_rag_token_draws_several_sequences_as_transformers_for_the_question_repeated(family: str) -> None:
    """RagToken.generate ignores num_return_sequences while sampling, but a repeated question has its rows."""
    rag = tiny_rag(family, 2)
    batch = cases.random_batch(rag, 8, n_docs=3, size=1)
    repeated = oracle.Batch(batch.questions * 4, rag.pad_token_id)
    settings = sampled(rag, {"temperature": 1.1}, 4)
    theirs = oracle.rag_token(rag.token, repeated, settings)

    several = sampled(rag, {"temperature": 1.1}, 4, num_return_sequences=4)
    requests = engine.requests_of(batch, several, Strategy.RAG_TOKEN)
    (ours,) = engine.answers_to(engine.new_runner(rag.backbone), requests)
    assert sorted(h.token_ids for h in ours) == sorted(a.token_ids for [a] in theirs)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rag_token_draws_for_a_question_are_its_own(num_beams: int) -> None:
    """transformers draws for a whole batch from one stream; here company moves nothing."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 4, n_docs=3, size=4)
    settings = sampled(rag, {"top_p": 0.9}, 99, num_beams=num_beams)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    ours = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for question, mine in zip(batch.questions, ours, strict=True):
        alone = oracle.Batch([question], rag.pad_token_id)
        engine.assert_same([mine], oracle.rag_token(rag.token, alone, settings), settings)


def test_different_seeds_draw_different_answers() -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 4, n_docs=2, size=1)
    drawn = set()
    for seed in range(8):
        requests = engine.requests_of(batch, sampled(rag, {}, seed), Strategy.RAG_TOKEN)
        [[answer]] = engine.answers_to(engine.new_runner(rag.backbone), requests)
        drawn.add(tuple(answer.token_ids))
    assert len(drawn) > 4


def test_first_tokens_are_drawn_from_the_mixture() -> None:
    """The share of each first token over many seeds is its marginal probability."""
    rag = tiny_rag("bart", 1)
    batch = cases.random_batch(rag, 6, n_docs=3, size=1)
    start = torch.tensor([[rag.decoder_start_token_id]])
    with torch.no_grad():
        logits = rag.token(**batch.tensors(), decoder_input_ids=start, do_marginalize=True, n_docs=3).logits
    expected = logits[0, 0].exp()

    rng, draws = random.Random(0), 2000
    settings = sampled(rag, {}, rng.randrange(2**31), max_length=2, num_return_sequences=draws)
    settings = cases.changed(settings, forced_eos_token_id=None)
    requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
    (ours,) = engine.answers_to(engine.new_runner(rag.backbone), requests)
    counts = torch.bincount(torch.tensor([h.token_ids[1] for h in ours]), minlength=len(expected))
    assert (counts / draws - expected).abs().max() < 0.04
