"""Our side: a model runner in this process, asked what transformers was asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from generator_service.engine.messages import GenerateAnswer, ScoreTarget
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.model.backbone import Backbone
from generator_service.types import (
    Compatibility,
    GenerationSettings,
    Hypothesis,
    QuestionScore,
    SequenceDecoding,
    Strategy,
)
from tests.parity.oracle import Answer, Batch, trimmed

_ids = itertools.count()

TIE = 1e-5


def new_runner(backbone: Backbone) -> ModelRunner:
    return ModelRunner(backbone, None, torch.device("cpu"))


def requests_of(
    batch: Batch,
    settings: GenerationSettings,
    strategy: Strategy,
    *,
    compatibility: Compatibility = Compatibility.MASKED,
    decoding: SequenceDecoding = SequenceDecoding.THOROUGH,
    do_deduplication: bool = True,
) -> list[Request]:
    """One request a question."""
    hf = compatibility is Compatibility.HF
    return [
        Request(
            GenerateAnswer(
                request_id=next(_ids),
                strategy=strategy,
                sequence_decoding=decoding,
                compatibility=compatibility,
                settings=settings,
                contexts=question.contexts,
                padded_contexts=[batch.padded(c) for c in question.contexts] if hf else None,
                doc_scores=question.doc_scores,
                do_deduplication=do_deduplication,
                exclude_bos_score=True,
            )
        )
        for question in batch.questions
    ]


def answers_to(runner: ModelRunner, requests: Sequence[Request]) -> list[list[Hypothesis]]:
    """Run until all are answered."""
    found: dict[int, list[Hypothesis]] = {}
    schedule = Schedule(admit=list(requests))
    while len(found) < len(requests):
        outcome = runner.execute(schedule)
        found |= {request.request_id: hypotheses for request, hypotheses in outcome.answered}
        schedule = Schedule()
    return [found[r.request_id] for r in requests]


def score(backbone: Backbone, targets: Sequence[ScoreTarget]) -> list[QuestionScore]:
    """Scores of targets, all in one step."""
    outcome = new_runner(backbone).execute(Schedule(admit=[Request(t) for t in targets]))
    return [s for _, s in sorted(outcome.scored, key=lambda pair: pair[0].request_id)]


def new_id() -> int:
    return next(_ids)


def assert_same(
    ours: Sequence[Sequence[Hypothesis]], theirs: Sequence[Sequence[Answer]], settings: GenerationSettings
) -> None:
    """Equal tokens and scores; tokens may differ only where two of transformers' scores tie."""
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert len(mine) == len(expected)
        for index, (hypothesis, answer) in enumerate(zip(mine, expected, strict=True)):
            assert answer.score is None or same_score(hypothesis.score, answer.score), (mine, expected)
            if not _ties(expected, index):
                assert trimmed(hypothesis.token_ids, settings) == answer.token_ids, (mine, expected)


def same_score(ours: float, theirs: float) -> bool:
    """Within 1e-4; a negative length penalty makes scores so large that float32 has fewer digits left."""
    return math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-4)


def _ties(answers: Sequence[Answer], index: int) -> bool:
    score = answers[index].score
    if score is None:
        return False
    others = [a.score for i, a in enumerate(answers) if i != index and a.score is not None]
    return any(abs(score - other) < TIE * max(1.0, abs(score)) for other in others)
