"""What an engine must survive: crowds that come and go, the largest question, the shortest answers."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

import msgspec
import pytest
import torch

from generator_service.engine.engine_core import EngineCore
from generator_service.engine.messages import EncodeQuestion, Generated, Progress, Report
from generator_service.engine.model_runner import ModelRunner, StepOutcome
from generator_service.engine.scheduler import Schedule, SchedulerLimits
from generator_service.types import Hypothesis, SequenceDecoding, Strategy
from tests.generator_service.engine.test_engine_core import core, drained, nothing_is_left, work
from tests.parity.test_batch_independence import answered_alone, assert_equal, crowd, target
from tests.parity.tiny_models import VOCAB_SIZE, tiny_rag


class FakeRunner:
    """Takes three steps for a question, whatever it asks; knows when it was told to forget one."""

    backbone: Any = type(
        "FakeBackbone",
        (),
        {"page_slots": 1, "context_bytes": staticmethod(lambda _: 4), "slot_bytes": staticmethod(lambda: 4)},
    )

    def __init__(self) -> None:
        self.running: dict[int, tuple[Any, int]] = {}

    def forget(self, request_id: int) -> None:
        self.running.pop(request_id, None)

    def execute(self, schedule: Schedule) -> StepOutcome:
        outcome = StepOutcome()
        for request in schedule.dropped:
            self.forget(request.request_id)
        outcome.encoded = [(request, b"") for request in schedule.encode]
        self.running |= {request.request_id: (request, 3) for request in schedule.admit}
        for request_id, (request, left) in list(self.running.items()):
            self.running[request_id] = (request, left - 1)
            if left == 1:
                del self.running[request_id]
                answer = Hypothesis(
                    token_ids=[2, request_id], score=0.0, log_likelihood=0.0, document_posterior=[]
                )
                outcome.answered.append((request, [answer]))
        return outcome


def test_ten_thousand_questions_cancelled_at_random_leave_nothing_and_lose_nothing() -> None:
    rng = random.Random(1)
    runner: Any = FakeRunner()
    engine = EngineCore(runner, cache_budget_bytes=50_000, limits=SchedulerLimits(max_rows=200))
    waiting, cancelled, reports = set(range(10_000)), set(), []
    for request_id in range(10_000):
        deadline_s = time.monotonic() + 600 if rng.random() < 0.5 else None
        engine.add_request(work(request_id, priority=rng.randint(-10, 10), deadline_s=deadline_s))
    while engine.has_work():
        for request_id in rng.sample(sorted(waiting - cancelled), k=min(40, len(waiting - cancelled))):
            engine.abort(request_id)
            cancelled.add(request_id)
        found = engine.step()
        reports += found
        waiting -= {r.request_id for r in found if isinstance(r, Generated)}
    answered = [r.request_id for r in reports if isinstance(r, Generated)]
    assert len(answered) == len(set(answered)) == len(reports)
    assert set(answered) | cancelled == set(range(10_000))
    assert not set(answered) & cancelled, "nothing is reported of a question that was cancelled"
    assert len(cancelled) > 1000
    assert len(answered) > 1000
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.rows, stats.cache_bytes) == (0, 0, 0, 0)
    assert not runner.running


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_hundreds_of_questions_cancelled_at_random_leave_nothing_on_the_device(family: str) -> None:
    rng, rag = random.Random(family), tiny_rag(family)
    engine = EngineCore(
        ModelRunner(rag.backbone, None, torch.device("cpu")),
        cache_budget_bytes=10**9,
        limits=SchedulerLimits(max_rows=150),
    )
    requests = [request for seed in range(3) for request in crowd(rag, 90 + seed, size=100)]
    waiting, cancelled, reports = {r.request_id for r in requests}, set(), []
    for request in requests:
        streams, priority = rng.random() < 0.5, rng.randint(-10, 10)
        engine.add_request(
            msgspec.structs.replace(request.work, stream=streams, priority=priority)  # type: ignore[type-var]
        )
    while engine.has_work():
        for request_id in rng.sample(sorted(waiting), k=min(3, len(waiting))):
            engine.abort(request_id)
            cancelled.add(request_id)
        found = engine.step()
        reports += [r for r in found if not isinstance(r, Progress)]
        waiting -= {r.request_id for r in reports if isinstance(r, Generated)} | cancelled
    assert all(isinstance(r, Generated) for r in reports)
    answered = {r.request_id for r in reports if isinstance(r, Generated)}
    assert answered | cancelled == {r.request_id for r in requests}
    assert not answered & cancelled
    assert min(len(answered), len(cancelled)) > 40
    assert nothing_is_left(engine)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("seed", range(2))
def test_priorities_company_and_cancellations_change_no_answer(family: str, seed: int) -> None:
    """Every question joins at its own step, some stream, some are scored, some go away in the middle."""
    rag, rng = tiny_rag(family, seed), random.Random(seed)
    requests = crowd(rag, 50 + seed, size=14)
    alone = answered_alone(rag, requests)
    runner = ModelRunner(rag.backbone, None, torch.device("cpu"))
    engine = EngineCore(runner, cache_budget_bytes=10**9, limits=SchedulerLimits(max_rows=60))
    leaving = set(rng.sample([r.request_id for r in requests], k=4))
    reports: list[Report] = []
    for request in requests:
        streams, priority = rng.random() < 0.5, rng.randint(-10, 10)
        engine.add_request(
            msgspec.structs.replace(request.work, stream=streams, priority=priority)  # type: ignore[type-var]
        )
        if rng.random() < 0.3:
            engine.add_request(target(rag).work)
        for _ in range(rng.randint(0, 3)):
            reports += engine.step()
        if request.request_id in leaving:
            engine.abort(request.request_id)
    reports += drained(engine)
    answers = {r.request_id: r.hypotheses for r in reports if isinstance(r, Generated)}
    assert {r.request_id for r in requests} - leaving <= answers.keys()
    for request_id, found in answers.items():
        assert_equal(found, alone[request_id])
    sent: dict[int, list[int]] = defaultdict(list)
    for report in reports:
        if isinstance(report, Progress):
            sent[report.request_id] += report.token_ids
    for request_id, tokens in sent.items():
        if answers.get(request_id):
            assert tokens == answers[request_id][0].token_ids[1:]
    assert engine.stats().cache_bytes == 0


def test_beside_the_largest_question_the_small_ones_are_answered_and_so_is_it() -> None:
    settings = msgspec.structs.replace(work(0).settings, num_beams=8, max_length=30, min_length=28)
    contexts = [[5 + i % 40] * 20 for i in range(12)]
    large = work(1, settings=settings, contexts=contexts, doc_scores=[0.0] * 12)
    needed = core()._cache.required_bytes(_request(large))
    engine = core(budget_bytes=-(-needed * 16 // 15))  # a sixteenth is kept for small ones
    assert engine._cache.max_request_bytes - needed in {0, 1}
    kept = engine._cache.budget_bytes // 16 // engine._cache.required_bytes(_request(work(0)))
    first_small = [work(10 + i) for i in range(kept + 3)]
    for one in first_small:
        engine.add_request(one)
    engine.step()
    engine.add_request(large)
    for i in range(80):
        engine.add_request(work(100 + i))
    order: list[int] = []
    while 1 not in engine._scheduler.running:
        order += [r.request_id for r in engine.step() if isinstance(r, Generated)]
    assert len(order) >= 20, "while it does not fit, small ones pass it"
    assert len(engine._scheduler.waiting) > 0, "but not all of them"
    begun = len(order)
    order += [r.request_id for r in drained(engine) if isinstance(r, Generated)]
    assert len(order) == kept + 3 + 1 + 80
    assert order.index(1) > begun + 10, "and small ones do not wait for its end"


def _request(one: Any) -> Any:
    from generator_service.engine.request import Request

    return Request(one)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("decoding", list(SequenceDecoding))
@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 2},
        {"max_length": 2, "num_beams": 1},
        {"eos_token_ids": tuple(range(VOCAB_SIZE))},
        {"eos_token_ids": tuple(range(VOCAB_SIZE)), "num_beams": 1},
        {"allowed_sequences": "the end token alone"},
        {"do_sample": True, "top_k": VOCAB_SIZE, "seed": 1},
        {"do_sample": True, "top_k": 10 * VOCAB_SIZE, "num_beams": 1, "seed": 1},
        {"num_beams": 40},
    ],
    ids=str,
)
def test_the_shortest_answers_and_the_widest_choices_are_answered(
    family: str, strategy: Strategy, decoding: SequenceDecoding, changes: dict[str, Any]
) -> None:
    """One token; an end token in the first step, in all beams at once; as many candidates as the vocabulary has."""
    rag, engine = tiny_rag(family), core(family=family)
    if "allowed_sequences" in changes:
        changes = {"allowed_sequences": ((rag.eos_token_id,),)}
    special = {
        "decoder_start_token_id": rag.decoder_start_token_id,
        "eos_token_ids": (rag.eos_token_id,),
        "pad_token_id": rag.pad_token_id,
    }
    settings = msgspec.structs.replace(work(0).settings, **(special | changes))
    common = {"strategy": strategy, "sequence_decoding": decoding, "settings": settings, "stream": True}
    engine.add_request(work(1, **common))
    engine.add_request(work(2, contexts=[[5]], doc_scores=[3.0], **common))
    engine.add_request(work(3, contexts=[[2], [2]], doc_scores=[0.0, 0.0], **common))  # empty documents
    answers = [r for r in drained(engine) if isinstance(r, Generated)]
    assert sorted(r.request_id for r in answers) == [1, 2, 3]
    for report in answers:
        assert report.hypotheses
        assert all(len(h.token_ids) >= 2 for h in report.hypotheses)
        assert sum(report.hypotheses[0].document_posterior) == pytest.approx(1.0, abs=1e-5)
    assert engine.stats().cache_bytes == 0


def test_many_questions_to_encode_delay_an_answer_by_their_steps_alone() -> None:
    runner: Any = FakeRunner()
    engine = EngineCore(runner, cache_budget_bytes=50_000, limits=SchedulerLimits(max_questions_encoded=8))
    engine.add_request(work(1))
    for request_id in range(2, 66):
        engine.add_request(EncodeQuestion(request_id=request_id, input_ids=[1], attention_mask=[1]))
    reports = [engine.step() for _ in range(12)]
    assert sum(len(found) for found in reports) == 65
    assert any(isinstance(r, Generated) for found in reports for r in found)
