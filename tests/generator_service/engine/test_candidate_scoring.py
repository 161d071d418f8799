"""RAG-Sequence's candidates: what a document's own search knows of them is not asked of the decoder again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generator_service.engine import tree_scoring
from generator_service.engine.messages import GenerateAnswer, ScoreTarget
from generator_service.engine.request import Request
from generator_service.model.backbone import RowBatch
from generator_service.types import Compatibility, GenerationSettings, Hypothesis, SequenceDecoding, Strategy
from tests.parity import cases, engine
from tests.parity.oracle import Batch, Question
from tests.parity.tiny_models import TinyRag, tiny_rag

ONE, OTHER = [11, 12, 13, 14, 15], [21, 22, 23]


@pytest.fixture
def rag() -> TinyRag:
    return tiny_rag("bart", 0)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], int]]:
    """Sequences, and the number of contexts, of every tree that is laid out."""
    seen: list[tuple[list[list[int]], int]] = []
    inner = tree_scoring.lay_out

    def watched(sequences: Any, contexts: Any, *others: Any) -> Any:
        seen.append((list(sequences), len(contexts)))
        return inner(sequences, contexts, *others)

    monkeypatch.setattr(tree_scoring, "lay_out", watched)
    return seen


def settings_of(rag: TinyRag, *, forced: bool = False, num_beams: int = 3) -> GenerationSettings:
    first_and_last = {"forced_bos_token_id": rag.bos_token_id, "forced_eos_token_id": rag.eos_token_id}
    return cases.plain_settings(
        rag,
        max_length=7,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        min_length=5,
        **(first_and_last if forced else {}),
    )


def answered(
    rag: TinyRag, contexts: list[list[int]], settings: GenerationSettings, **asked: Any
) -> tuple[Request, list[Hypothesis]]:
    batch = Batch([Question(contexts, [0.3 * d for d in range(len(contexts))])], rag.pad_token_id)
    (request,) = engine.requests_of(batch, settings, Strategy.RAG_SEQUENCE, **asked)
    (found,) = engine.answers_to(engine.new_runner(rag.backbone), [request])
    return request, found


def assert_scored_as_targets(rag: TinyRag, request: Request, found: list[Hypothesis]) -> None:
    work = request.work
    assert isinstance(work, GenerateAnswer)
    targets = [
        ScoreTarget(
            request_id=engine.new_id(),
            strategy=Strategy.RAG_SEQUENCE,
            compatibility=Compatibility.MASKED,
            contexts=work.contexts,
            doc_scores=work.doc_scores,
            labels=hypothesis.token_ids,
            pad_token_id=rag.pad_token_id,
            exclude_first=False,
        )
        for hypothesis in found
    ]
    for hypothesis, score in zip(found, engine.score(rag.backbone, targets), strict=True):
        assert hypothesis.log_likelihood == pytest.approx(score.log_likelihood, abs=1e-5)
        assert hypothesis.document_posterior == pytest.approx(score.document_posterior, abs=1e-5)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_document_knows_all_its_candidates(
    rag: TinyRag, laid_out: list[Any], num_beams: int, forced: bool
) -> None:
    request, found = answered(rag, [ONE], settings_of(rag, forced=forced, num_beams=num_beams))
    assert len(found) == num_beams
    assert not laid_out
    assert_scored_as_targets(rag, request, found)


def test_equal_documents_know_each_others_candidates(rag: TinyRag, laid_out: list[Any]) -> None:
    request, found = answered(rag, [ONE, ONE], settings_of(rag))
    assert not laid_out
    assert_scored_as_targets(rag, request, found)


@pytest.mark.parametrize("forced", [False, True])
def test_documents_are_asked_of_the_candidates_of_others_only(
    rag: TinyRag, laid_out: list[Any], forced: bool
) -> None:
    settings = settings_of(rag, forced=forced)
    own = [{tuple(h.token_ids) for h in answered(rag, [context], settings)[1]} for context in (ONE, OTHER)]
    request, found = answered(rag, [ONE, OTHER], settings)
    asked = [({tuple(s) for s in sequences}, num_contexts) for sequences, num_contexts in laid_out]
    assert asked == [(own[1] - own[0], 1), (own[0] - own[1], 1)]
    assert_scored_as_targets(rag, request, found)


def test_searches_over_pads_know_no_scores(rag: TinyRag, laid_out: list[Any]) -> None:
    answered(rag, [ONE, OTHER], settings_of(rag), compatibility=Compatibility.HF)
    ((sequences, num_contexts),) = laid_out
    assert num_contexts == 2
    assert len(sequences) == len({tuple(s) for s in sequences})


def test_fast_decoding_takes_forced_tokens_for_certain(rag: TinyRag) -> None:
    settings = settings_of(rag, forced=True)
    _, thorough = answered(rag, [ONE], settings)
    _, fast = answered(rag, [ONE], settings, decoding=SequenceDecoding.FAST)
    best = max(fast, key=lambda h: h.log_likelihood)
    same = next(h for h in thorough if h.token_ids == best.token_ids)
    assert best.log_likelihood > same.log_likelihood


def test_all_trees_of_a_step_go_through_the_head_together(rag: TinyRag) -> None:
    contexts = rag.backbone.encode([torch.tensor(ONE), torch.tensor(OTHER)])
    trees = [[[2, 5, 6, 7], [2, 5, 8]], [[2, 9, 9, 9]]]
    scorings = [
        tree_scoring.lay_out(sequences, contexts[: 2 - i], rag.backbone, torch.device("cpu"))
        for i, sequences in enumerate(trees)
    ]
    random = torch.Generator().manual_seed(0)
    width = rag.backbone.decode(RowBatch([scorings[0].block])).shape[1]
    states = [torch.randn(s.block.num_rows, width, generator=random) for s in scorings]
    with torch.inference_mode():
        together = tree_scoring.edge_log_probs(scorings, states, rag.backbone)
        for scoring, own, edges in zip(scorings, states, together, strict=True):
            log_probs = torch.log_softmax(rag.backbone.logits(own).float(), dim=-1)
            by_context = log_probs.view(len(scoring.block.contexts), -1, log_probs.shape[1])
            expected = by_context[:, scoring.tree.edge_rows, scoring.tree.edge_tokens]
            torch.testing.assert_close(edges, expected)
