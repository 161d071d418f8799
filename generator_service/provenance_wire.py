"""Provenance and explanations as messages of rag.generator.v1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from generator_service import wire
from generator_service.answerer import QuestionContexts
from generator_service.explainer import ExplainedAnswer
from rag.generator.v1 import explanation_pb2


def write_explanations(
    questions: Sequence[QuestionContexts], explained: Sequence[ExplainedAnswer], *, include_documents: bool
) -> Iterable[explanation_pb2.Explanation]:
    """One message a question."""
    for question, one in zip(questions, explained, strict=True):
        explanation = one.explanation
        yield explanation_pb2.Explanation(
            answer=wire.write_hypothesis(one.answer),
            left_out=[_left_out(one, place) for place in range(len(explanation.left_out))],
            documents=wire.write_documents(question) if include_documents else [],
            n_docs=question.n_docs,
        )


def _left_out(one: ExplainedAnswer, place: int) -> explanation_pb2.LeftOut:
    explanation, text = one.explanation, one.without[place]
    left_out = explanation.left_out[place]
    message = explanation_pb2.LeftOut(document=left_out.document)
    if left_out.log_likelihood is not None:
        message.log_likelihood = left_out.log_likelihood
        message.change = left_out.log_likelihood - explanation.log_likelihood
    if text is not None:
        message.answer.CopyFrom(wire.write_hypothesis(text))
    if explanation.best is not None:
        answer = left_out.answer
        message.answer_differs = answer is None or answer.token_ids != explanation.best.token_ids
    return message
