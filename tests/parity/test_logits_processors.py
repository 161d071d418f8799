"""Each logits processor by itself, under greedy and beam search, in both models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from generator_service.types import GenerationSettings, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.oracle import Batch, Question
from tests.parity.tiny_models import TinyRag, tiny_rag

N_DOCS = 3
FAMILIES = ["bart", "t5-gated", "t5-pad3"]


def _allowed(rag: TinyRag) -> tuple[tuple[int, ...], ...]:
    end = rag.eos_token_id
    answers = [(5, 6), (5, 6, 7), (5, 8), (9,), (10, 11, 12, 13), (14, 14), (15,), (16, 5), (17, 18, 19)]
    return tuple((*a, end) for a in answers)


PROCESSORS: dict[str, Callable[[TinyRag], dict[str, Any]]] = {
    "min_length": lambda _: {"min_length": 8},
    "min_new_tokens": lambda _: {"min_new_tokens": 8},
    "no_repeat_ngram_1": lambda _: {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_2": lambda _: {"no_repeat_ngram_size": 2},
    "repetition_penalty": lambda _: {"repetition_penalty": 2.5},
    "repetition_bonus": lambda _: {"repetition_penalty": 0.5},
    "encoder_repetition_penalty": lambda _: {"encoder_repetition_penalty": 2.0},
    "encoder_repetition_bonus": lambda _: {"encoder_repetition_penalty": 0.4},
    "encoder_no_repeat_ngram_1": lambda _: {"encoder_no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_2": lambda _: {"encoder_no_repeat_ngram_size": 2},
    "bad_words": lambda _: {"bad_words_ids": tuple((t,) for t in range(4, 50, 2))},
    "bad_phrases": lambda _: {"bad_words_ids": tuple((a, b) for a in range(4, 60) for b in range(4, 60, 3))},
    "suppress_tokens": lambda _: {"suppress_tokens": tuple(range(4, 50, 2))},
    "begin_suppress_tokens": lambda rag: {"begin_suppress_tokens": (rag.eos_token_id, *range(4, 40))},
    "begin_suppress_after_forced_bos": lambda _: {
        "begin_suppress_tokens": tuple(range(4, 40)),
        "forced_bos_token_id": 41,
    },
    "forced_bos": lambda _: {"forced_bos_token_id": 9},
    "forced_eos": lambda rag: {"forced_eos_token_id": rag.eos_token_id, "min_length": 6},
    "forced_both": lambda rag: {"forced_bos_token_id": 9, "forced_eos_token_id": rag.eos_token_id},
    "several_eos": lambda rag: {"eos_token_ids": (rag.eos_token_id, 5, 8, 15, 33, 55)},
    "renormalize_logits": lambda _: {"renormalize_logits": True, "bad_words_ids": ((8,), (15,), (5, 5))},
    "allowed_sequences": lambda rag: {"allowed_sequences": _allowed(rag), "min_length": 0},
    "allowed_sequences_all_too_short": lambda rag: {
        "allowed_sequences": _allowed(rag),
        "min_length": 9,
        "num_return_sequences": 1,
    },
}


def stuttering_batch(rag: TinyRag, *, ragged: bool = True) -> Batch:
    """Contexts that say their words twice, as the tiny models like to do."""
    batch = cases.random_batch(rag, 17, n_docs=N_DOCS, size=3, ragged=ragged)
    questions = [
        Question([[word for word in c for _ in range(2)] for c in q.contexts], q.doc_scores)
        for q in batch.questions
    ]
    return Batch(questions, rag.pad_token_id)


def settings_of(rag: TinyRag, processor: str | None, num_beams: int) -> GenerationSettings:
    plain = cases.plain_settings(
        rag, num_beams=num_beams, num_return_sequences=num_beams, max_length=10, min_length=4
    )
    return plain if processor is None else cases.changed(plain, **PROCESSORS[processor](rag))


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_processor_acts_as_in_transformers(
    processor: str, family: str, strategy: Strategy, num_beams: int
) -> None:
    rag = tiny_rag(family, 2)
    settings = settings_of(rag, processor, num_beams)
    batch = stuttering_batch(rag, ragged=not cases.reads_pads(settings))
    rag.set_n_docs(N_DOCS)
    if strategy is Strategy.RAG_TOKEN:
        theirs = oracle.rag_token(rag.token, batch, settings)
    else:
        theirs = oracle.rag_sequence(rag.mathematical, batch, settings, masked=True)
    requests = engine.requests_of(batch, settings, strategy)
    engine.assert_same(engine.answers_to(engine.new_runner(rag.backbone), requests), theirs, settings)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processor_of_the_cases_above_changes_answers(processor: str) -> None:
    """Parity under a processor that does nothing would be worth nothing."""
    changed = []
    for family in FAMILIES:
        rag = tiny_rag(family, 2)
        batch = stuttering_batch(rag)
        for num_beams in (1, 4):
            answers = []
            for name in (processor, None):
                settings = settings_of(rag, name, num_beams)
                requests = engine.requests_of(batch, settings, Strategy.RAG_TOKEN)
                found = engine.answers_to(engine.new_runner(rag.backbone), requests)
                answers.append([h.token_ids for q in found for h in q])
            changed.append(answers[0] != answers[1])
    assert sum(changed) >= 2
