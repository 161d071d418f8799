"""What answers owe to each document: their log-likelihood without it, and what would be answered then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from generator_service.answerer import (
    Answerer,
    AnswerText,
    GenerationOptions,
    QuestionContexts,
    Stages,
    generate_work,
    over_all_documents,
    score_work,
)
from generator_service.engine.async_engine import AsyncEngine, gather_or_cancel
from generator_service.engine.messages import GenerateAnswer, Generated, Scored, ScoreTarget
from generator_service.errors import NoAnswerError
from generator_service.provenance import leave_one_out
from generator_service.types import Hypothesis, Strategy
from rag_serving.errors import InvalidArgumentError


@dataclass(frozen=True)
class LeftOut:
    """An answer without one document, named by its place among n_docs.

    log_likelihood is None where it is the only one; answer is None where none was asked for, or there is none.
    """

    document: int
    log_likelihood: float | None
    answer: Hypothesis | None


@dataclass(frozen=True)
class Explanation:
    """A traced answer, its log-likelihood, and what it is without each document that is there.

    best is what all documents together answer, where that was asked for. Posteriors are over n_docs.
    """

    answer: Hypothesis
    log_likelihood: float
    left_out: list[LeftOut]
    best: Hypothesis | None


@dataclass(frozen=True)
class ExplainedAnswer:
    """An explanation for people: its answer and, in left_out's order, the answers without each document."""

    explanation: Explanation
    answer: AnswerText
    without: list[AnswerText | None]


class Explainer:
    """Runs explanations on the engine; knows neither protobuf nor gRPC."""

    def __init__(self, engine: AsyncEngine, answerer: Answerer) -> None:
        self._engine, self._answerer = engine, answerer

    async def explain(
        self,
        questions: Sequence[QuestionContexts],
        labels: Sequence[Sequence[int]] | None,
        options: GenerationOptions,
        stages: Stages,
        *,
        answer_without: bool,
    ) -> list[Explanation]:
        """Explains an answer for each question: labels where given, without pads, or else the best generated one.

        Raises InvalidArgumentError where that is more work than the service ever takes, NoAnswerError where there is
        no answer to explain.
        """
        works = [
            _works(
                question, None if labels is None else labels[index], options, answer_without=answer_without
            )
            for index, question in enumerate(questions)
        ]
        count = sum(len(of_question) for of_question in works)
        if count > self._engine.max_queued:
            raise InvalidArgumentError(
                "generate",
                f"leaving out each document asks for {count} answers, and the service takes"
                f" {self._engine.max_queued} at once: explain fewer questions, or set skip_answers",
            )
        started = time.perf_counter()
        with self._engine.accepted(count):
            reports = await gather_or_cancel([self._engine.answer_together(one) for one in works])
        stages.generate_s = time.perf_counter() - started
        return [
            _explanation(index, question, of_question, found, options.strategy)
            for index, (question, of_question, found) in enumerate(
                zip(questions, works, reports, strict=True)
            )
        ]

    async def texts_off_loop(
        self, questions: Sequence[QuestionContexts], explanations: Sequence[Explanation]
    ) -> list[ExplainedAnswer]:
        """Explanations as text, in a thread where there is much of it."""
        return await asyncio.to_thread(
            lambda: [self._texts(q, one) for q, one in zip(questions, explanations, strict=True)]
        )

    def _texts(self, question: QuestionContexts, explanation: Explanation) -> ExplainedAnswer:
        (answer,) = self._answerer.texts(question, [explanation.answer])
        without: list[AnswerText | None] = []
        for place, left_out in enumerate(explanation.left_out):
            if left_out.answer is None:
                without.append(None)
                continue
            documents = list(question.documents)
            if documents:  # an answer without a document is not found again in it
                documents[place] = replace(documents[place], title="", text="")
            without += self._answerer.texts(replace(question, documents=documents), [left_out.answer])
        return ExplainedAnswer(explanation, answer, without)


def _works(
    question: QuestionContexts,
    labels: Sequence[int] | None,
    options: GenerationOptions,
    *,
    answer_without: bool,
) -> list[GenerateAnswer | ScoreTarget]:
    """What one question asks of a device, all at once, so that its contexts are encoded once and shared.

    First the answer explained; then, where wanted, the best answer of all documents, where that is not the first; then
    one without each document.
    """
    whole = generate_work(question, options)
    traced = msgspec.structs.replace(whole, trace=True)
    explained = traced if labels is None else _target(question, labels, options)
    if not answer_without or len(question.contexts) == 1:
        return [explained]
    fewer = [
        generate_work(_without(question, document), options) for document in range(len(question.contexts))
    ]
    return [explained, *fewer] if labels is None else [explained, whole, *fewer]


def _target(question: QuestionContexts, labels: Sequence[int], options: GenerationOptions) -> ScoreTarget:
    return score_work(
        question,
        labels,
        strategy=options.strategy,
        compatibility=options.compatibility,
        pad_token_id=options.settings.pad_token_id,
        exclude_first=False,
        priority=options.priority,
        trace=True,
    )


def _without(question: QuestionContexts, document: int) -> QuestionContexts:
    """The question with one context fewer; the rest keep their places among n_docs, and their padding."""
    kept = [place for place in range(len(question.contexts)) if place != document]
    padded = question.padded_contexts
    return QuestionContexts(
        contexts=[question.contexts[place] for place in kept],
        padded_contexts=None if padded is None else [padded[place] for place in kept],
        doc_scores=[question.doc_scores[place] for place in kept],
        documents=[],
        present=[question.present[place] for place in kept],
        n_docs=question.n_docs,
    )


def _explanation(
    index: int,
    question: QuestionContexts,
    works: Sequence[GenerateAnswer | ScoreTarget],
    reports: Sequence[object],
    strategy: Strategy,
) -> Explanation:
    target, first = works[0], reports[0]
    if isinstance(first, Scored):
        assert isinstance(target, ScoreTarget)
        score = first.score
        answer = Hypothesis(
            token_ids=target.labels,
            score=score.log_likelihood,
            log_likelihood=score.log_likelihood,
            document_posterior=score.document_posterior,
            trace=score.trace,
        )
        generated = list(reports[1:])
    else:
        found = _best(first)
        if found is None:
            raise NoAnswerError(index)
        answer, generated = found, list(reports)
    assert answer.trace is not None
    best, fewer = (_best(generated[0]), generated[1:]) if len(generated) > 1 else (None, [])
    figures = leave_one_out(answer.trace, question.doc_scores, strategy)
    left_out = []
    for place, log_likelihood in enumerate(figures.without):
        other = _best(fewer[place]) if fewer else None
        if other is not None:
            other = over_all_documents(other, _without(question, place))
        left_out.append(LeftOut(question.present[place], log_likelihood, other))
    return Explanation(
        answer=over_all_documents(answer, question),
        log_likelihood=figures.log_likelihood,
        left_out=left_out,
        best=best,
    )


def _best(report: object) -> Hypothesis | None:
    assert isinstance(report, Generated)
    return report.hypotheses[0] if report.hypotheses else None
