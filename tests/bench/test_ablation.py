"""What each idea gives: every ablation really does without its idea, and answers as the whole engine does."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench.micro import ablation, engine, ideas, workload
from bench.micro.engine import Engine
from bench.micro.ideas import IDEAS, Idea
from bench.micro.workload import Shape
from generator_service.model import cpu_kernels
from generator_service.model.backbone import RowBatch
from generator_service.model.loader import as_backbone
from generator_service.model.paged.backbone import PagedBackbone, paged
from generator_service.types import Compatibility, Hypothesis, Strategy

SHAPE = Shape(n_docs=3, context_length=20, num_beams=3, answer_length=5)
TREE, KNOWN = "candidates as a prefix tree", "candidates not scored again"
FIRST_STEP, FORCED = "first step with", "no head and no last step"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(workload.BART_SHAPES, "tiny", (2, 64, 4))
    monkeypatch.setattr(workload, "PADDED_LENGTH", 30)
    return workload.generator("tiny")


def answers(engine_: Engine, idea: Idea, model: Any, strategy: Strategy) -> list[list[Hypothesis]]:
    asked = idea.questions(idea.asked(workload.questions(SHAPE, 2, model.config.vocab_size, 1)))
    with idea.off():
        return engine_.answer(asked, strategy, Compatibility.MASKED)


def assert_same(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> None:
    for (one,), (other,) in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("idea", [i for i in IDEAS if i.exact and "cpu" in i.devices], ids=lambda i: i.name)
def test_without_an_idea_the_answers_are_the_same(idea: Idea, model: Any) -> None:
    whole, other = Engine(model, SHAPE, forced_tokens=True), ablation.without(idea, model, SHAPE)
    for strategy in idea.strategies:
        expected = answers(whole, Idea("none is off", asked=idea.asked), model, strategy)
        assert_same(answers(other, idea, model, strategy), expected)


def test_without_tiles_the_answers_over_the_arena_are_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over_arena(model: Any, **_: Any) -> Any:
        return paged(as_backbone(model), budget_bytes=2**24, max_rows=0)

    monkeypatch.setattr(engine, "as_backbone", over_arena)
    idea = next(i for i in IDEAS if "tile" in i.name)
    whole, other = Engine(model, SHAPE, forced_tokens=True), ablation.without(idea, model, SHAPE)
    tiles: list[int] = []
    _watch(monkeypatch, PagedBackbone, "decode", lambda batch: tiles.append(_tiles(batch)))
    for strategy in Strategy:
        expected, least = answers(whole, Idea("none is off"), model, strategy), sum(tiles)
        tiles.clear()
        assert_same(answers(other, idea, model, strategy), expected)
        assert sum(tiles) > least
        tiles.clear()


def _tiles(batch: RowBatch) -> int:
    return ideas.paged_rows.Layout.of(batch).num_tiles


def test_each_idea_that_saves_rows_does(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    headed: list[int] = []
    backbone = type(as_backbone(model))
    _watch(
        monkeypatch, backbone, "decode", lambda batch: decoded.append(sum(b.num_rows for b in batch.blocks))
    )
    _watch(monkeypatch, backbone, "logits", lambda states: headed.append(states.shape[0]))

    def rows(idea: Idea, strategy: Strategy) -> tuple[int, int]:
        decoded.clear()
        headed.clear()
        answers(ablation.without(idea, model, SHAPE), idea, model, strategy)
        return sum(decoded), sum(headed)

    for name in (TREE, KNOWN, FIRST_STEP, FORCED):
        idea = next(i for i in IDEAS if i.name.startswith(name))
        strategy = idea.strategies[-1]
        whole, without = rows(Idea("none is off"), strategy), rows(idea, strategy)
        assert without[0] > whole[0], name
        if name != FIRST_STEP:  # its token is forced: there is no head to save
            assert without[1] > whole[1], name


def test_contexts_that_questions_share_are_encoded_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    _watch(monkeypatch, type(as_backbone(model)), "encode", lambda contexts: encoded.append(len(contexts)))
    idea = next(i for i in IDEAS if i.name.endswith("encoded once"))
    for off, count in ((Idea("none is off", asked=idea.asked), SHAPE.n_docs), (idea, 2 * SHAPE.n_docs)):
        encoded.clear()
        answers(ablation.without(off, model, SHAPE), off, model, Strategy.RAG_TOKEN)
        assert sum(encoded) == count


def test_reordered_beams_keep_to_their_own_slots(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slot is everybody's; from then on a beam's are its own, which without reordering they are not."""
    strangers: list[int] = []

    def look(batch: RowBatch) -> None:
        for block in batch.blocks:
            beams = SHAPE.num_beams
            if block.ancestry is not None and block.ancestry.shape[0] == beams:
                lanes = torch.arange(block.ancestry.shape[1] - 1) % beams
                strange = block.ancestry[:, 1:] & (lanes != torch.arange(beams)[:, None])
                strangers.append(int(strange.sum()))

    _watch(monkeypatch, type(as_backbone(model)), "decode", look)
    idea = next(i for i in IDEAS if "reordered" in i.name)
    for off in (Idea("none is off"), idea):
        strangers.clear()
        answers(ablation.without(off, model, SHAPE), off, model, Strategy.RAG_TOKEN)
        assert len(strangers) > SHAPE.num_beams
        assert (sum(strangers) == 0) is (off is idea)


def test_kernels_of_its_own_attend_unless_they_are_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_kernels.library() is None:
        pytest.skip("no cpu_kernels were built")
    kernels = [Mock(wraps=kernel) for kernel in (cpu_kernels.cross_attention, cpu_kernels.self_attention)]
    for kernel, name in zip(kernels, ("cross_attention", "self_attention"), strict=True):
        monkeypatch.setattr(cpu_kernels, name, kernel)
    idea = next(i for i in IDEAS if "kernels of its own" in i.name)
    for off, attend in ((Idea("none is off"), True), (idea, False)):
        for kernel in kernels:
            kernel.reset_mock()
        answers(ablation.without(off, model, SHAPE), off, model, Strategy.RAG_TOKEN)
        assert [kernel.called for kernel in kernels] == [attend, attend]


def _watch(patch: pytest.MonkeyPatch, owner: type, name: str, see: Callable[[Any], Any]) -> None:
    inner = getattr(owner, name)

    def watched(self: Any, argument: Any) -> Any:
        see(argument)
        return inner(self, argument)

    patch.setattr(owner, name, watched)


def test_a_row_for_each_idea_and_strategy(model: Any) -> None:
    rows = list(
        ablation.measure("tiny", SHAPE, 1, IDEAS, device=torch.device("cpu"), dtype=torch.float32, rounds=1)
    )
    assert {(r.idea, r.strategy) for r in rows} == {
        (i.name, s.value) for i in IDEAS if "cpu" in i.devices for s in i.strategies
    }
    assert all(row.gain == row.without_s / row.with_s > 0 for row in rows)
