"""From questions to answers: encode, retrieve, generate; the device batches across requests."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from generator_service import answer_span
from generator_service.answer_span import Span
from generator_service.answer_stream import AnswerStream, GrowingText, Pacing, Piece
from generator_service.engine.async_engine import AsyncEngine, gather_or_cancel
from generator_service.engine.messages import EncodeQuestion, GenerateAnswer, Progress, ScoreTarget
from generator_service.errors import EngineFailureError, MismatchError, NoDocumentsError
from generator_service.metrics import GeneratorMetrics
from generator_service.provenance import Provenance, SourceFinder
from generator_service.retrieval_client import FoundDocument, RetrievalClient, RetrievalSettings
from generator_service.tokenization import TextTokenizer
from generator_service.types import (
    Compatibility,
    GenerationSettings,
    Hypothesis,
    QuestionScore,
    SequenceDecoding,
    Strategy,
)
from rag_serving.request_deadline import time_left_s


@dataclass(frozen=True)
class Questions:
    """Questions as the question encoder takes them: token ids and masks a question; texts where they came as such."""

    input_ids: list[list[int]]
    attention_mask: list[list[int]]
    texts: list[str] | None


@dataclass(frozen=True)
class QuestionContexts:
    """What one question is answered from; documents is empty where the caller brought the contexts.

    present holds the places, among n_docs asked for, of the documents that are there.
    """

    contexts: list[list[int]]
    padded_contexts: list[list[int]] | None
    doc_scores: list[float]
    documents: list[FoundDocument]
    present: list[int]
    n_docs: int


@dataclass
class Stages:
    """Seconds of a request's stages, and the index generation that retrieval used."""

    encode_s: float = 0.0
    retrieve_s: float = 0.0
    queue_s: float = 0.0
    generate_s: float = 0.0
    generation: int = 0
    began_s: float = field(default_factory=time.perf_counter)

    @property
    def total_s(self) -> float:
        """Since the request began."""
        return time.perf_counter() - self.began_s


@dataclass(frozen=True)
class GenerationOptions:
    """How a batch of questions is answered."""

    strategy: Strategy
    sequence_decoding: SequenceDecoding
    compatibility: Compatibility
    settings: GenerationSettings
    do_deduplication: bool
    exclude_bos_score: bool
    priority: int = 0
    trace: bool = False
    abstain_below: float = 0.0


@dataclass(frozen=True)
class AnswerText:
    """A hypothesis for people: its text, where it stands in the documents, and what its tokens rest on if traced."""

    hypothesis: Hypothesis
    text: str
    span: Span | None
    provenance: Provenance | None = None


class Answerer:
    """Runs the stages; knows neither protobuf nor gRPC."""

    def __init__(
        self,
        engine: AsyncEngine,
        retrieval: RetrievalClient | None,
        generator_tokenizer: TextTokenizer,
        metrics: GeneratorMetrics,
        *,
        question_pad_token_id: int,
    ) -> None:
        self._engine, self._retrieval = engine, retrieval
        self._tokenizer, self._metrics = generator_tokenizer, metrics
        self._question_pad_token_id = question_pad_token_id

    async def encode(self, questions: Questions, stages: Stages) -> npt.NDArray[np.float32]:
        """question_hidden_states float32 [batch, dim]."""
        started = time.perf_counter()
        works = [
            EncodeQuestion(request_id=0, input_ids=ids, attention_mask=mask)
            for ids, mask in zip(questions.input_ids, questions.attention_mask, strict=True)
        ]
        with self._engine.accepted(len(works)):
            hidden = await gather_or_cancel([self._engine.encode(work) for work in works])
        stages.encode_s = time.perf_counter() - started
        self._metrics.encode_seconds.observe(stages.encode_s)
        return np.stack(hidden)

    async def retrieve(
        self, questions: Questions, settings: RetrievalSettings, stages: Stages, *, pad_token_id: int | None
    ) -> list[QuestionContexts]:
        """Contexts of each question; pad_token_id pads them as Hugging Face does, where its semantics are asked for."""
        if self._retrieval is None:
            raise MismatchError("this generator has no retriever: send contexts, or set retriever_address")
        hidden = await self.encode(questions, stages)
        started = time.perf_counter()
        width = max(len(ids) for ids in questions.input_ids)
        padded = [ids + [self._question_pad_token_id] * (width - len(ids)) for ids in questions.input_ids]
        retrieval = await self._retrieval.retrieve(
            hidden,
            texts=questions.texts,
            input_ids=None if questions.texts is not None else np.array(padded, dtype=np.int64),
            settings=settings,
        )
        stages.retrieve_s, stages.generation = time.perf_counter() - started, retrieval.generation
        self._metrics.retrieve_seconds.observe(stages.retrieve_s)
        found = []
        for index, question in enumerate(retrieval.questions):
            if not question.contexts:
                raise NoDocumentsError(
                    f"the retriever found no document for question {index}: its index is empty, or"
                    " no document meets filter and score_threshold"
                )
            rows = None
            if pad_token_id is not None:
                rows = [c + [pad_token_id] * (retrieval.padded_length - len(c)) for c in question.contexts]
            count = len(question.contexts)
            found.append(
                QuestionContexts(
                    question.contexts,
                    rows,
                    question.doc_scores,
                    question.documents,
                    list(range(count)),
                    count,
                )
            )
        return found

    async def generate(
        self,
        questions: Sequence[QuestionContexts],
        options: GenerationOptions,
        stages: Stages,
        on_progress: Callable[[int, Progress], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """Hypotheses of each question, best first; document_posterior is over n_docs.

        on_progress is told, by a question's index, what has become certain; it must not block.
        """
        stream = on_progress is not None
        works = [msgspec.structs.replace(generate_work(q, options), stream=stream) for q in questions]
        with self._engine.accepted(len(works)):
            reports = await gather_or_cancel(
                [
                    self._engine.generate(work, on_progress and functools.partial(on_progress, index))
                    for index, work in enumerate(works)
                ]
            )
        stages.queue_s = max(r.queue_s for r in reports)
        stages.generate_s = max(r.generate_s for r in reports)
        answers = [r.hypotheses for r in reports]
        self._metrics.observe_answers(options.strategy, reports)
        return [
            [over_all_documents(h, q) for h in hypotheses]
            for q, hypotheses in zip(questions, answers, strict=True)
        ]

    async def stream(
        self,
        questions: Sequence[QuestionContexts],
        options: GenerationOptions,
        stages: Stages,
        pacing: Pacing,
        send: Callable[[Piece], Awaitable[None]],
    ) -> list[list[Hypothesis]]:
        """generate, giving pieces to send as they become certain; document_posterior is over n_docs there too.

        Raises EngineFailureError where an answer that had to begin anew came out otherwise than what was sent of it.
        """

        def new_text() -> GrowingText:
            return GrowingText(self._tokenizer.decode, self._tokenizer.byte_token_ids)

        stream = AnswerStream(len(questions), pacing, new_text, options.settings.decoder_start_token_id)
        answers = asyncio.ensure_future(self.generate(questions, options, stages, stream.add))
        try:
            async for piece in stream.pieces(answers):
                await send(_piece_over_all_documents(piece, questions[piece.question]))
            found = await answers
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
        for index, hypotheses in enumerate(found):
            sent = stream.sent(index)
            if hypotheses and hypotheses[0].token_ids[: len(sent)] != sent:
                raise EngineFailureError(
                    "the answer had to begin anew and came out otherwise; ask again", 0.1
                )
        return found

    def confidences(self, answers: Sequence[Sequence[Hypothesis]], options: GenerationOptions) -> list[float]:
        """p(best answer | question) of each question, 0 where there is none; those to abstain from are counted."""
        found = [math.exp(h[0].log_likelihood) if h else 0.0 for h in answers]
        self._metrics.observe_abstentions(
            options.strategy, sum(confidence < options.abstain_below for confidence in found)
        )
        return found

    async def score(
        self,
        questions: Sequence[QuestionContexts],
        labels: Sequence[Sequence[int]],
        *,
        strategy: Strategy,
        compatibility: Compatibility,
        pad_token_id: int,
        exclude_first: Sequence[bool],
        priority: int = 0,
    ) -> list[QuestionScore]:
        """Score one target a question."""
        works = [
            score_work(
                question,
                target,
                strategy=strategy,
                compatibility=compatibility,
                pad_token_id=pad_token_id,
                exclude_first=exclude,
                priority=priority,
            )
            for question, target, exclude in zip(questions, labels, exclude_first, strict=True)
        ]
        with self._engine.accepted(len(works)):
            reports = await gather_or_cancel([self._engine.score(work) for work in works])
        return [report.score for report in reports]

    def texts(self, question: QuestionContexts, hypotheses: Sequence[Hypothesis]) -> list[AnswerText]:
        """Hypotheses as text, found again in the question's documents."""
        bodies = [document.text for document in question.documents]
        titles = [document.title for document in question.documents]
        sources = SourceFinder(question.contexts, bodies, self._tokenizer)
        out = []
        for hypothesis in hypotheses:
            text = self._tokenizer.decode(hypothesis.token_ids)
            span = answer_span.find(text, bodies, titles, hypothesis.document_posterior)
            provenance = None
            if hypothesis.trace is not None:
                provenance = sources.provenance(hypothesis).over(question.present, question.n_docs)
            out.append(AnswerText(hypothesis, text, span, provenance))
        return out

    async def texts_off_loop(
        self, questions: Sequence[QuestionContexts], answers: Sequence[Sequence[Hypothesis]]
    ) -> list[list[AnswerText]]:
        """texts for a batch, in a thread where there is much of it."""
        return await asyncio.to_thread(
            lambda: [self.texts(q, hypotheses) for q, hypotheses in zip(questions, answers, strict=True)]
        )


def generate_work(question: QuestionContexts, options: GenerationOptions) -> GenerateAnswer:
    """What the engine is asked for one question; the caller's deadline holds."""
    return GenerateAnswer(
        request_id=0,
        strategy=options.strategy,
        sequence_decoding=options.sequence_decoding,
        compatibility=options.compatibility,
        settings=options.settings,
        contexts=question.contexts,
        padded_contexts=question.padded_contexts,
        doc_scores=question.doc_scores,
        do_deduplication=options.do_deduplication,
        exclude_bos_score=options.exclude_bos_score,
        trace=options.trace,
        priority=options.priority,
        deadline_s=_deadline_s(),
    )


def score_work(
    question: QuestionContexts,
    labels: Sequence[int],
    *,
    strategy: Strategy,
    compatibility: Compatibility,
    pad_token_id: int,
    exclude_first: bool,
    priority: int,
    trace: bool = False,
) -> ScoreTarget:
    """What the engine is asked for one target; the caller's deadline holds."""
    return ScoreTarget(
        request_id=0,
        strategy=strategy,
        compatibility=compatibility,
        contexts=question.contexts,
        doc_scores=question.doc_scores,
        labels=list(labels),
        pad_token_id=pad_token_id,
        exclude_first=exclude_first,
        trace=trace,
        priority=priority,
        deadline_s=_deadline_s(),
    )


def _deadline_s() -> float | None:
    """The caller's deadline on time.monotonic's clock."""
    left_s = time_left_s()
    return None if left_s is None else time.monotonic() + left_s


def over_all_documents(hypothesis: Hypothesis, question: QuestionContexts) -> Hypothesis:
    """Documents that are not there have no part in an answer."""
    if len(question.present) == question.n_docs:
        return hypothesis
    return msgspec.structs.replace(
        hypothesis, document_posterior=_widened(hypothesis.document_posterior, question)
    )


def _piece_over_all_documents(piece: Piece, question: QuestionContexts) -> Piece:
    if len(question.present) == question.n_docs:
        return piece
    return dataclasses.replace(
        piece, document_posterior=[_widened(row, question) for row in piece.document_posterior]
    )


def _widened(posterior: Sequence[float], question: QuestionContexts) -> list[float]:
    wide = [0.0] * question.n_docs
    for place, share in zip(question.present, posterior, strict=True):
        wide[place] = share
    return wide
