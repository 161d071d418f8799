"""The call Score: what a request asks for, and its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from generator_service import wire
from generator_service.answerer import Answerer, QuestionContexts, Stages
from generator_service.checkpoint import Checkpoint
from generator_service.generation_defaults import GenerationDefaults
from generator_service.request_checks import check_priority
from generator_service.request_inputs import RequestInputs
from generator_service.request_targets import RequestTargets
from generator_service.types import Compatibility, QuestionScore, Strategy
from rag.generator.v1 import generator_service_pb2
from rag.tensor.v1 import tensor_pb2
from rag_serving import tensor_codec
from rag_serving.errors import InvalidArgumentError


class ScoreCalls:
    """Scores by one Answerer. What it raises becomes a status in the error interceptor."""

    def __init__(
        self,
        answerer: Answerer,
        checkpoint: Checkpoint,
        inputs: RequestInputs,
        targets: RequestTargets,
        defaults: GenerationDefaults,
        *,
        vocab_size: int,
    ) -> None:
        self._answerer, self._checkpoint = answerer, checkpoint
        self._inputs, self._targets, self._defaults = inputs, targets, defaults
        self._vocab_size = vocab_size

    async def score(self, request: generator_service_pb2.ScoreRequest) -> generator_service_pb2.ScoreResponse:
        """The marginal log-likelihood and the loss of given targets."""
        check_priority(request.priority)
        strategy = (
            wire.read_enum(wire.STRATEGIES, request.strategy, "strategy") or self._checkpoint.default_strategy
        )
        compatibility = wire.read_enum(wire.COMPATIBILITIES, request.compatibility, "compatibility")
        epsilon = (
            request.label_smoothing
            if request.HasField("label_smoothing")
            else self._checkpoint.label_smoothing
        )
        if not 0 <= epsilon < 1:
            raise InvalidArgumentError("label_smoothing", "must be at least 0 and below 1", epsilon)
        pad = self._defaults.resolve({}, strategy, 0).pad_token_id
        stages = Stages()
        if request.WhichOneof("target") is None:
            raise InvalidArgumentError("target", "one of its fields must be set")
        _, contexts = await self._inputs.contexts(request, stages, pad_token_id=None)
        labels = self._targets.labels(request, len(contexts), pad, compatibility)
        scores = await self._answerer.score(
            contexts,
            labels,
            strategy=strategy,
            compatibility=compatibility,
            pad_token_id=pad,
            exclude_first=self._exclude_first(request, strategy, compatibility, labels),
            priority=request.priority,
        )
        reduce = request.reduce_loss if request.HasField("reduce_loss") else self._checkpoint.reduce_loss
        return generator_service_pb2.ScoreResponse(
            log_likelihoods=_floats([s.log_likelihood for s in scores]),
            loss=_floats(_losses(scores, epsilon, self._vocab_size, reduce=reduce)),
            document_posterior=_document_table(contexts, [s.document_posterior for s in scores], 0.0),
            doc_scores=_document_table(contexts, [q.doc_scores for q in contexts], -np.inf),
            strategy=wire.WIRE_STRATEGIES[strategy],
            strategy_differs_from_checkpoint=strategy is not self._checkpoint.default_strategy,
            index_generation=stages.generation,
        )

    def _exclude_first(
        self,
        request: generator_service_pb2.ScoreRequest,
        strategy: Strategy,
        compatibility: Compatibility,
        labels: Sequence[Sequence[int]],
    ) -> list[bool]:
        wanted = (
            request.exclude_bos_score
            if request.HasField("exclude_bos_score")
            else self._checkpoint.exclude_bos_score
        )
        bos = self._checkpoint.bos_token_id
        starts = [len(row) > 1 and bos is not None and row[1] == bos for row in labels]
        if not wanted or strategy is Strategy.RAG_TOKEN:
            return [False] * len(labels)
        return [all(starts)] * len(labels) if compatibility is Compatibility.HF else starts


def _losses(scores: Sequence[QuestionScore], epsilon: float, vocab_size: int, *, reduce: bool) -> list[float]:
    losses = [(1 - epsilon) * s.nll_loss + epsilon / vocab_size * s.smooth_loss for s in scores]
    return [sum(losses)] if reduce else losses


def _document_table(
    questions: Sequence[QuestionContexts], rows: Sequence[Sequence[float]], absent: float
) -> tensor_pb2.Tensor:
    width = max(q.n_docs for q in questions)
    table = np.full((len(questions), width), absent, dtype=np.float32)
    for index, (question, row) in enumerate(zip(questions, rows, strict=True)):
        table[index, question.present] = row
    return tensor_codec.encode(table)


def _floats(values: Sequence[float]) -> tensor_pb2.Tensor:
    return tensor_codec.encode(np.array(values, dtype=np.float32))
