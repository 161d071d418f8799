"""An answer depends on its question alone: not on company, on when it joined, or on who left."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from generator_service.engine.messages import ScoreTarget
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.types import Compatibility, Hypothesis, SequenceDecoding, Strategy
from tests.parity import cases, engine
from tests.parity.tiny_models import TinyRag, tiny_rag

Alone = dict[int, list[Hypothesis]]


def crowd(rag: TinyRag, seed: int, size: int = 12) -> list[Request]:
    """Questions that differ in everything."""
    rng = random.Random(f"crowd {seed}")
    requests: list[Request] = []
    for index in range(size):
        batch = cases.random_batch(rag, 100 * seed + index, n_docs=rng.randint(1, 5), size=1)
        num_beams = rng.randint(1, 5)
        fixed = {"num_beams": num_beams, "do_sample": rng.random() < 0.3}
        if num_beams == 1:
            fixed["num_return_sequences"] = 1
        requests += engine.requests_of(
            batch,
            cases.changed(cases.random_settings(rag, 7000 + 100 * seed + index, **fixed), seed=index),
            rng.choice(list(Strategy)),
            compatibility=rng.choice(list(Compatibility)),
            decoding=rng.choice(list(SequenceDecoding)),
        )
    return requests


def target(rag: TinyRag) -> Request:
    return Request(
        ScoreTarget(
            request_id=engine.new_id(),
            strategy=Strategy.RAG_TOKEN,
            compatibility=Compatibility.MASKED,
            contexts=[[5, 6, 7], [8, 9]],
            doc_scores=[0.0, 1.0],
            labels=[rag.decoder_start_token_id, 11, 12, rag.eos_token_id],
            pad_token_id=rag.pad_token_id,
            exclude_first=False,
        )
    )


def answered_alone(rag: TinyRag, requests: Sequence[Request]) -> Alone:
    return {r.request_id: engine.answers_to(engine.new_runner(rag.backbone), [r])[0] for r in requests}


def assert_equal(found: list[Hypothesis], alone: list[Hypothesis]) -> None:
    assert [h.token_ids for h in found] == [h.token_ids for h in alone]
    for mine, expected in zip(found, alone, strict=True):
        assert mine.score == pytest.approx(expected.score, abs=1e-5, rel=1e-5)
        assert mine.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-5, rel=1e-5)
        assert mine.document_posterior == pytest.approx(expected.document_posterior, abs=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5", "t5-gated"])
@pytest.mark.parametrize("seed", range(3))
def test_crowd_changes_no_answer(family: str, seed: int) -> None:
    rag = tiny_rag(family, seed)
    requests = crowd(rag, seed)
    alone = answered_alone(rag, requests)
    together = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for request, found in zip(requests, together, strict=True):
        assert_equal(found, alone[request.request_id])


@pytest.mark.parametrize("decoder", ["auto", "general"])
@pytest.mark.parametrize("family", ["bart", "t5-gated"])
@pytest.mark.parametrize("seed", range(2))
def test_joining_midway_and_leaving_change_no_answer(family: str, seed: int, decoder: str) -> None:
    """One question joins a step; every third is forgotten two steps later; targets are scored in between."""
    rag = tiny_rag(family, seed, decoder)
    requests = crowd(rag, seed)
    alone = answered_alone(rag, requests)
    forgotten = set(requests[::3])
    runner, found = engine.new_runner(rag.backbone), {}
    scores = []
    for step in range(40):
        joining = requests[step : step + 1] + ([target(rag)] if step % 4 == 0 else [])
        leaving = [r for r in requests[max(0, step - 2) : step - 1] if r in forgotten]
        outcome = runner.execute(Schedule(admit=joining, dropped=leaving))
        found |= {request.request_id: hypotheses for request, hypotheses in outcome.answered}
        scores += [s.log_likelihood for _, s in outcome.scored]
    for request in requests:
        if request not in forgotten:
            assert_equal(found[request.request_id], alone[request.request_id])
    assert max(scores) - min(scores) < 1e-5
    assert not runner.execute(Schedule()).tokens, "nothing of the crowd may be left behind"


def test_forgetting_a_question_while_its_candidates_wait_leaves_the_others() -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 1, n_docs=3, size=2)
    settings = cases.plain_settings(rag, num_beams=3, max_length=4)
    leaver, stayer = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE)
    (alone,) = engine.answers_to(engine.new_runner(rag.backbone), [stayer])
    runner = engine.new_runner(rag.backbone)
    runner.execute(Schedule(admit=[leaver, stayer]))
    runner.execute(Schedule())
    runner.execute(Schedule())  # both searches are over: their candidates wait for the next step
    outcome = runner.execute(Schedule(dropped=[leaver]))
    ((request, found),) = outcome.answered
    assert request is stayer
    assert_equal(found, alone)
