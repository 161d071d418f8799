"""The engine over the arena, on the CPU: the plain path's answers, the arena's memory given back, and found wanting."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence

import pytest
import torch

from generator_service.engine.engine_core import EngineCore
from generator_service.engine.messages import Failed, Generated
from generator_service.engine.request import Request
from generator_service.engine.scheduler import SchedulerLimits
from generator_service.model.paged.arena import PAGE_SLOTS
from generator_service.model.paged.backbone import PagedBackbone, paged
from generator_service.types import Compatibility, Hypothesis, SequenceDecoding, Strategy
from tests.parity import cases, engine
from tests.parity.tiny_models import TinyRag, tiny_rag


def crowd(rag: TinyRag, seed: int, size: int) -> list[Request]:
    """Questions of both strategies, all widths, sampled and not."""
    rng = random.Random(seed)
    requests: list[Request] = []
    for index in range(size):
        batch = cases.random_batch(rag, 100 * seed + index, n_docs=rng.randint(1, 5), size=1)
        settings = cases.random_settings(
            rag, 100 * seed + index, num_beams=rng.randint(2, 4), do_sample=False
        )
        requests += engine.requests_of(
            batch,
            settings,
            rng.choice(list(Strategy)),
            compatibility=rng.choice(list(Compatibility)),
            decoding=rng.choice(list(SequenceDecoding)),
        )
    return requests


def over_arena(rag: TinyRag, *, pages: int, max_rows: int = 64) -> PagedBackbone:
    size = PAGE_SLOTS * rag.backbone.slot_bytes()
    backbone = paged(rag.backbone, budget_bytes=pages * size, max_rows=max_rows)
    assert isinstance(backbone, PagedBackbone)
    return backbone


def assert_same(ours: Sequence[Hypothesis], theirs: Sequence[Hypothesis]) -> None:
    assert len(ours) == len(theirs)
    scores = [h.score for h in theirs]
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert engine.same_score(mine.score, other.score)
        if not any(abs(s - other.score) < engine.TIE * 10 for i, s in enumerate(scores) if i != index):
            assert mine.token_ids == other.token_ids


@pytest.mark.parametrize("family", ["bart", "t5-gated"])
def test_answers_over_the_arena_are_the_plain_path_s(family: str) -> None:
    """Steps of every size: with a bucket of their own, and too large for any."""
    rag = tiny_rag(family)
    backbone = over_arena(rag, pages=4000)
    requests = crowd(rag, 1, 10)
    expected = engine.answers_to(engine.new_runner(rag.backbone), requests)
    found = engine.answers_to(engine.new_runner(backbone), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    gc.collect()
    assert backbone.arena.num_free_pages == backbone.arena.num_pages


def reports(core: EngineCore) -> dict[int, Generated | Failed]:
    found: dict[int, Generated | Failed] = {}
    while core.has_work():
        for report in core.step():
            assert isinstance(report, Generated | Failed)
            found[report.request_id] = report
    return found


def test_admission_by_pages_never_fills_the_arena(caplog: pytest.LogCaptureFixture) -> None:
    """Contexts of a token and answers of two take whole pages: reckoned by the byte, they overfilled the arena."""
    rag = tiny_rag("bart")
    backbone = over_arena(rag, pages=40)
    budget = 40 * PAGE_SLOTS * backbone.slot_bytes()
    core = EngineCore(engine.new_runner(backbone), cache_budget_bytes=budget, limits=SchedulerLimits())
    batch = cases.random_batch(rag, 5, n_docs=3, size=12)
    settings = cases.random_settings(rag, 5, num_beams=2, do_sample=False, max_length=4)
    for request in engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE):
        assert core.add_request(request.work) is None
    assert all(isinstance(r, Generated) for r in reports(core).values())
    assert "out of memory" not in caplog.text


def test_full_arena_splits_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    """The budget promises more pages than there are: the questions run a few at a time, with the same answers."""
    rag = tiny_rag("bart")
    backbone = over_arena(rag, pages=30)
    core = EngineCore(engine.new_runner(backbone), cache_budget_bytes=10**9, limits=SchedulerLimits())
    requests = engine.requests_of(
        cases.random_batch(rag, 6, n_docs=2, size=12),
        cases.random_settings(rag, 6, num_beams=2, do_sample=False, max_length=10),
        Strategy.RAG_TOKEN,
    )
    expected = engine.answers_to(engine.new_runner(rag.backbone), requests)
    for request in requests:
        assert core.add_request(request.work) is None
    found = reports(core)
    assert "out of memory" in caplog.text
    for request, theirs in zip(requests, expected, strict=True):
        report = found[request.request_id]
        assert isinstance(report, Generated)
        assert_same(report.hypotheses, theirs)
    gc.collect()
    assert backbone.arena.num_free_pages == backbone.arena.num_pages
    assert backbone.arena.keys.dtype is torch.float32


def test_question_larger_than_the_arena_is_refused_when_it_runs() -> None:
    """Alone it still does not fit: the asker is told so, and the worker goes on."""
    rag = tiny_rag("bart")
    backbone = over_arena(rag, pages=2)
    core = EngineCore(engine.new_runner(backbone), cache_budget_bytes=10**9, limits=SchedulerLimits())
    settings = cases.random_settings(rag, 7, num_beams=2, do_sample=False)
    (request,) = engine.requests_of(
        cases.random_batch(rag, 7, n_docs=5, size=1), settings, Strategy.RAG_TOKEN
    )
    assert core.add_request(request.work) is None
    (report,) = reports(core).values()
    assert isinstance(report, Failed)
    assert report.status == "RESOURCE_EXHAUSTED"
    gc.collect()
    assert backbone.arena.num_free_pages == 2
