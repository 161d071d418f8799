"""The engine's loop over a tiny model: reports, refusals, failures."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
import torch

from generator_service.engine import messages
from generator_service.engine.engine_core import EngineCore
from generator_service.engine.messages import Failed, GenerateAnswer, Generated, Report
from generator_service.engine.model_runner import ModelRunner, _blocks
from generator_service.engine.scheduler import SchedulerLimits
from generator_service.types import Batching, Compatibility, GenerationSettings, SequenceDecoding, Strategy
from tests.parity.tiny_models import tiny_rag


def core(
    budget_bytes: int = 10**9, family: str = "bart", batching: Batching = Batching.CONTINUOUS
) -> EngineCore:
    runner = ModelRunner(tiny_rag(family).backbone, None, torch.device("cpu"))
    return EngineCore(runner, cache_budget_bytes=budget_bytes, limits=SchedulerLimits(batching=batching))


def work(request_id: int, **changes: Any) -> GenerateAnswer:
    settings = GenerationSettings(
        max_length=8, num_beams=2, decoder_start_token_id=2, eos_token_ids=(2,), pad_token_id=1
    )
    base = GenerateAnswer(
        request_id=request_id,
        strategy=Strategy.RAG_SEQUENCE,
        sequence_decoding=SequenceDecoding.THOROUGH,
        compatibility=Compatibility.MASKED,
        settings=settings,
        contexts=[[5, 6, 7], [8, 9]],
        padded_contexts=None,
        doc_scores=[1.0, 0.0],
        do_deduplication=True,
        exclude_bos_score=True,
    )
    return msgspec.structs.replace(base, **changes)


def drained(engine: EngineCore) -> list[Report]:
    reports = []
    while engine.has_work():
        reports += engine.step()
    return reports


def test_every_request_gets_one_report() -> None:
    engine = core()
    for request_id in range(5):
        strategy = Strategy.RAG_TOKEN if request_id % 2 else Strategy.RAG_SEQUENCE
        assert engine.add_request(work(request_id, strategy=strategy)) is None
    reports = drained(engine)
    assert all(isinstance(r, Generated) for r in reports)
    assert sorted(r.request_id for r in reports if isinstance(r, Generated)) == list(range(5))
    assert engine.stats().running == 0
    assert engine.stats().cache_bytes == 0
    assert engine.stats().tokens > 0


@pytest.mark.parametrize(
    ("batching", "together"),
    [(Batching.CONTINUOUS, False), (Batching.GATHER, True), (Batching.GATHER_EARLY, False)],
)
def test_gathering_answers_a_batch_together_or_each_when_it_is_there(
    batching: Batching, together: bool
) -> None:
    engine = core(batching=batching)
    for request_id, length in enumerate((3, 8, 5)):
        settings = msgspec.structs.replace(work(0).settings, max_length=length, min_length=length)
        engine.add_request(work(request_id, settings=settings))
    steps = []
    while engine.has_work():
        answers = [r.request_id for r in engine.step() if isinstance(r, Generated)]
        steps += [answers] if answers else []
    assert sorted(one for answers in steps for one in answers) == [0, 1, 2]
    assert (len(steps) == 1) == together


def test_a_batch_whose_last_question_is_aborted_is_answered() -> None:
    engine = core(batching=Batching.GATHER)
    settings = msgspec.structs.replace(work(0).settings, max_length=3)
    engine.add_request(work(0, settings=settings))
    engine.add_request(work(1))
    while engine.stats().running != 1:
        assert engine.step() == []
    engine.abort(1)
    assert [r.request_id for r in engine.step()] == [0]
    assert not engine.has_work()


def test_a_question_that_never_fits_is_refused_with_the_numbers() -> None:
    refused = core(budget_bytes=100).add_request(work(1))
    assert isinstance(refused, Failed)
    assert refused.status == "INVALID_ARGUMENT"
    assert "bytes of cache on the device, which has 94 for one request" in refused.message


def test_an_aborted_request_gets_no_report_and_leaves_nothing() -> None:
    engine = core()
    engine.add_request(work(1))
    engine.add_request(work(2))
    engine.step()
    engine.abort(1)
    reports = drained(engine)
    assert [r.request_id for r in reports if isinstance(r, Generated)] == [2]
    assert engine.stats().cache_bytes == 0


def nothing_is_left(engine: EngineCore) -> bool:
    """Of rows, bytes, questions, contexts: in the scheduler's books and in the runner."""
    stats, runner = engine.stats(), engine._runner
    books = (stats.waiting, stats.running, stats.rows, stats.cache_bytes)
    held = (runner._questions, runner._pools, runner._given, dict(runner._encoded))
    return books == (0, 0, 0, 0) and not any(held)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("begun", [0, 1, 3])
def test_a_question_out_of_time_is_told_so_and_gone_within_one_step(strategy: Strategy, begun: int) -> None:
    settings = msgspec.structs.replace(work(1).settings, max_length=20, min_length=20)
    engine, now_s = core(), time.monotonic()
    engine.add_request(work(1, strategy=strategy, settings=settings, deadline_s=now_s + 3600))
    for _ in range(begun):
        assert engine.step() == []
    for request in (*engine._scheduler.running.values(), *engine._scheduler.waiting.in_order()):
        request.work = msgspec.structs.replace(request.work, deadline_s=now_s)  # type: ignore[type-var]
        engine._scheduler.waiting._deadlines = [(now_s, 0, request)]
    (report,) = engine.step()
    assert isinstance(report, Failed)
    assert (report.request_id, report.status) == (1, "DEADLINE_EXCEEDED")
    assert nothing_is_left(engine)
    assert not engine.has_work()


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("begun", [0, 1, 3])
def test_an_aborted_question_is_gone_within_one_step(strategy: Strategy, begun: int) -> None:
    settings = msgspec.structs.replace(work(1).settings, max_length=20, min_length=20)
    engine = core()
    engine.add_request(work(1, strategy=strategy, settings=settings))
    for _ in range(begun):
        assert engine.step() == []
    engine.abort(1)
    assert engine.step() == []
    assert nothing_is_left(engine)
    assert not engine.has_work()


def test_candidates_of_one_question_are_scored_in_a_step_that_decodes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One pass through the decoder a step, whatever its rows are there for."""
    backbone = tiny_rag("bart").backbone
    decode, steps = type(backbone).decode, []

    def watched(self: Any, batch: Any) -> Any:
        steps.append(list(batch.blocks))
        return decode(self, batch)

    monkeypatch.setattr(type(backbone), "decode", watched)
    engine = core()
    settings = msgspec.structs.replace(work(1).settings, max_length=20, min_length=20)
    engine.add_request(work(1, strategy=Strategy.RAG_TOKEN, settings=settings))
    engine.add_request(
        work(
            2,
            settings=msgspec.structs.replace(settings, max_length=4, min_length=4),
            contexts=[[7, 8], [9, 10, 11]],
        )
    )
    together = 0
    while engine.has_work():
        scoring = [block for item in engine._runner._given for block in _blocks(item)]
        before = len(steps)
        engine.step()
        assert len(steps) == before + 1
        if scoring:
            assert all(any(block is one for one in steps[-1]) for block in scoring)
            together += len(steps[-1]) > len(scoring)
    assert together == 1


def test_a_failing_step_fails_its_questions_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = core()
    engine.add_request(work(1))

    def broken(*_: object) -> None:
        raise RuntimeError("device lost its mind")

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_rag("bart").backbone), "decode", broken)
        (report,) = engine.step()
    assert isinstance(report, Failed)
    assert report.status == "UNAVAILABLE"
    engine.add_request(work(2))
    assert [type(r) for r in drained(engine)] == [Generated]


@pytest.mark.parametrize("decoding", list(SequenceDecoding))
def test_num_return_sequences_beyond_the_candidates_gives_those_there_are(decoding: SequenceDecoding) -> None:
    """Hugging Face's topk crashes here (docs/parity.md)."""
    engine = core()
    settings = msgspec.structs.replace(work(1).settings, num_return_sequences=4, max_length=2)
    engine.add_request(work(1, settings=settings, sequence_decoding=decoding))
    (report,) = drained(engine)
    assert isinstance(report, Generated)
    answers = [tuple(h.token_ids) for h in report.hypotheses]
    assert 1 <= len(answers) <= 4
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_posteriors_are_distributions(strategy: Strategy) -> None:
    engine = core()
    engine.add_request(work(1, strategy=strategy))
    (report,) = drained(engine)
    assert isinstance(report, Generated)
    for hypothesis in report.hypotheses:
        assert sum(hypothesis.document_posterior) == pytest.approx(1.0, abs=1e-5)


def test_fast_decoding_scores_no_candidate_above_the_thorough_one() -> None:
    """Leaving documents out of the sum can only lower a candidate's likelihood (section 2.5)."""
    scores = {}
    for decoding in SequenceDecoding:
        engine = core()
        settings = msgspec.structs.replace(work(1).settings, num_return_sequences=4)
        engine.add_request(work(1, settings=settings, sequence_decoding=decoding, exclude_bos_score=False))
        (report,) = drained(engine)
        assert isinstance(report, Generated)
        scores[decoding] = {tuple(h.token_ids): h.score for h in report.hypotheses}
    shared = scores[SequenceDecoding.FAST].keys() & scores[SequenceDecoding.THOROUGH].keys()
    assert shared
    for candidate in shared:
        assert scores[SequenceDecoding.FAST][candidate] <= scores[SequenceDecoding.THOROUGH][candidate] + 1e-5


def test_messages_survive_the_wire() -> None:
    sent = work(7, settings=GenerationSettings(bad_words_ids=((1, 2),), forced_eos_token_id=2, seed=2**40))
    assert messages.decode_command(messages.encode(sent)) == sent
    report = Failed(request_id=1, status="UNAVAILABLE", message="é")
    assert messages.decode_report(messages.encode(report)) == report


def test_equal_contexts_of_running_questions_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_rag("bart").backbone
    encoded: list[list[int]] = []
    encode = type(backbone).encode

    def counting(self: Any, contexts: Any) -> Any:
        encoded.extend(c.tolist() for c in contexts)
        return encode(self, contexts)

    monkeypatch.setattr(type(backbone), "encode", counting)
    engine = core()
    engine.add_request(work(1))
    engine.step()
    engine.add_request(work(2, contexts=[[8, 9], [10, 11]]))
    engine.add_request(work(3, contexts=[[10, 11], [5, 6, 7]]))
    reports = drained(engine)
    assert len(reports) == 3
    assert sorted(encoded) == [[5, 6, 7], [8, 9], [10, 11]]
    engine.add_request(work(4))
    drained(engine)
    assert len(encoded) == 5, "contexts go with the last question that holds them"


def test_out_of_memory_splits_the_batch_and_every_question_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = core()
    for request_id in range(6):
        expected.add_request(work(request_id, contexts=[[5 + request_id, 6, 7], [8, 9]]))
    answers = {r.request_id: r.hypotheses for r in drained(expected) if isinstance(r, Generated)}

    backbone = tiny_rag("bart").backbone
    decode, refused = type(backbone).decode, []

    def small_device(self: Any, batch: Any) -> Any:
        if sum(block.num_rows for block in batch.blocks) > 80:
            refused.append(batch)
            raise torch.OutOfMemoryError
        return decode(self, batch)

    monkeypatch.setattr(type(backbone), "decode", small_device)
    engine = core()
    for request_id in range(6):
        engine.add_request(work(request_id, contexts=[[5 + request_id, 6, 7], [8, 9]]))
    reports = [r for r in drained(engine) if isinstance(r, Generated)]
    assert refused
    assert {r.request_id for r in reports} == set(range(6))
    for report in reports:
        for ours, theirs in zip(report.hypotheses, answers[report.request_id], strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)
    assert engine.stats().cache_bytes == 0


def test_a_question_that_alone_exhausts_the_device_is_refused_and_the_worker_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = core()
    engine.add_request(work(1))

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_rag("bart").backbone), "encode", full)
        reports = drained(engine)
    assert [(type(r), r.status) for r in reports if isinstance(r, Failed)] == [(Failed, "RESOURCE_EXHAUSTED")]
    engine.add_request(work(2))
    assert [type(r) for r in drained(engine)] == [Generated]
