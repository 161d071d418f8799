"""Pieces of RAG-Token answers: certain when they are sent, complete in the end, the same when an answer begins anew."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch

from generator_service.engine.engine_core import EngineCore
from generator_service.engine.messages import Generated, Progress, Report
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import SchedulerLimits
from generator_service.types import EarlyStopping, Strategy
from tests.generator_service.engine.test_engine_core import core, drained, work
from tests.parity import cases, engine
from tests.parity.tiny_models import TinyRag, tiny_rag


def streamed(reports: list[Report], request_id: int) -> list[Progress]:
    return [r for r in reports if isinstance(r, Progress) and r.request_id == request_id]


def joined(pieces: list[Progress]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def asked_to_stream(requests: list[Request]) -> list[Any]:
    return [msgspec.structs.replace(r.work, stream=True) for r in requests]  # type: ignore[type-var]


def random_works(rag: TinyRag, seed: int) -> list[Any]:
    works = []
    for case in range(6):
        number = 100 * seed + case
        batch = cases.random_batch(rag, number, n_docs=1 + case % 4, size=2)
        beams = 1 if case % 3 == 0 else 2 + case % 3
        fixed: dict[str, Any] = {"num_beams": beams, "do_sample": case % 2 == 0, "max_length": 14}
        if beams == 1:
            fixed["num_return_sequences"] = 1 + case % 2 if fixed["do_sample"] else 1
        settings = cases.random_settings(rag, number, **fixed)
        settings = cases.changed(settings, seed=number, early_stopping=list(EarlyStopping)[case % 3])
        works += asked_to_stream(engine.requests_of(batch, settings, Strategy.RAG_TOKEN))
    return works


@pytest.mark.parametrize("family", ["bart", "t5-gated"])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_never_taken_back_and_make_the_answer(family: str, seed: int) -> None:
    rag = tiny_rag(family, seed)
    running = EngineCore(
        ModelRunner(rag.backbone, None, torch.device("cpu")),
        cache_budget_bytes=10**9,
        limits=SchedulerLimits(max_rows=40),
    )
    works = random_works(rag, seed)
    for one in works:
        assert running.add_request(one) is None
    reports = drained(running)
    early = 0
    for one in works:
        (answer,) = (r for r in reports if isinstance(r, Generated) and r.request_id == one.request_id)
        pieces = streamed(reports, one.request_id)
        if not answer.hypotheses:
            continue
        assert joined(pieces) == answer.hypotheses[0].token_ids[1:]
        assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
        early += sum(len(p.token_ids) for p in pieces[:-1])
        rows = [row for piece in pieces for row in piece.document_posterior]
        assert len(rows) == len(answer.hypotheses[0].token_ids) - 1
        assert all(math.isclose(sum(row), 1.0, abs_tol=1e-5) for row in rows)
    assert early > 20, "beams agree on something before they end, and chains on everything"


def test_greedy_search_streams_every_token_in_the_step_that_finds_it() -> None:
    running = core()
    settings = msgspec.structs.replace(work(1).settings, num_beams=1, max_length=9, min_length=9)
    running.add_request(work(1, strategy=Strategy.RAG_TOKEN, settings=settings, stream=True))
    for step in range(1, 9):
        pieces = streamed(running.step(), 1)
        assert [len(p.token_ids) for p in pieces] == [1]
        assert pieces[0].last == (step == 8)
    assert not running.has_work()


def test_the_posteriors_of_the_pieces_average_to_that_of_the_answer() -> None:
    running = core()
    running.add_request(work(1, strategy=Strategy.RAG_TOKEN, stream=True))
    reports = drained(running)
    (answer,) = (r for r in reports if isinstance(r, Generated))
    rows = torch.tensor([row for piece in streamed(reports, 1) for row in piece.document_posterior])
    assert rows.mean(0).tolist() == pytest.approx(answer.hypotheses[0].document_posterior, abs=1e-5)


def test_rag_sequence_and_those_who_did_not_ask_get_no_pieces() -> None:
    running = core()
    running.add_request(work(1, stream=True))
    running.add_request(work(2, strategy=Strategy.RAG_TOKEN))
    assert [type(r) for r in drained(running)] == [Generated, Generated]


def test_an_answer_begun_anew_goes_on_where_its_pieces_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device out of memory starts its questions again: what callers have must not come twice."""
    settings = msgspec.structs.replace(work(1).settings, num_beams=1, max_length=12, min_length=12)
    backbone = tiny_rag("bart").backbone
    decode, steps = type(backbone).decode, 0

    def failing(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise torch.OutOfMemoryError
        return decode(self, batch)

    monkeypatch.setattr(type(backbone), "decode", failing)
    running = core()
    for request_id in (1, 2):
        running.add_request(work(request_id, strategy=Strategy.RAG_TOKEN, settings=settings, stream=True))
    reports = drained(running)
    for request_id in (1, 2):
        (answer,) = (r for r in reports if isinstance(r, Generated) and r.request_id == request_id)
        assert joined(streamed(reports, request_id)) == answer.hypotheses[0].token_ids[1:]
    assert steps > 11


def test_time_to_the_first_token_lies_between_admission_and_answer() -> None:
    running = core()
    running.add_request(work(1))
    (report,) = drained(running)
    assert isinstance(report, Generated)
    assert report.queue_s <= report.first_token_s <= report.queue_s + report.generate_s
