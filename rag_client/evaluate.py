"""A file of questions asked of a running pair: exact match, F1, retrieval recall and calibration."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rag_client.aio import AsyncRagClient
from rag_client.calibration import Calibration, calibration
from rag_client.evaluation import exact_match, f1, normalize_answer
from rag_client.options import GenerateOptions
from rag_client.question_file import Question
from rag_client.types import Answer, RetrievedDocument


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares from 0 to 1 over some questions.

    recall is of a document that holds the answer among the n_docs; exact match and F1 count an abstention as wrong.
    """

    questions: int
    exact_match: float
    f1: float
    recall: float
    abstained: float


@dataclass(frozen=True, slots=True)
class Calibrations:
    """Of documents: does one with posterior p hold the answer? Of answers: is one with confidence p right?"""

    documents: Calibration
    answers: Calibration


async def ask_all(
    generator: str,
    questions: Sequence[Question],
    options: GenerateOptions,
    *,
    batch_size: int,
    concurrency: int,
    timeout_s: float,
    asked: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Asks in batches, a few at once; answers come in the order of the questions, with their documents.

    `asked` hears how many questions each answered batch had. Raises RagClientError.
    """
    slots = asyncio.Semaphore(concurrency)
    whole: GenerateOptions = {**options, "include_documents": True}
    async with AsyncRagClient(generator, timeout_s=timeout_s) as client:

        async def ask(batch: Sequence[Question]) -> list[Answer]:
            async with slots:
                generation = await client.generate([one.question for one in batch], **whole)
            asked(len(batch))
            return generation.answers

        batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
        tasks = [asyncio.create_task(ask(batch)) for batch in batches]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return [answer for answers in found for answer in answers]


def figures(questions: Sequence[Question], answers: Sequence[Answer]) -> Figures:
    """Counts the answers."""
    pairs = list(zip(questions, answers, strict=True))
    return Figures(
        questions=len(pairs),
        exact_match=_mean([exact_match(answer.text, one.answers) for one, answer in pairs]),
        f1=_mean([f1(answer.text, one.answers) for one, answer in pairs]),
        recall=_mean([any(holds_answer(d, one) for d in answer.documents) for one, answer in pairs]),
        abstained=_mean([answer.abstained for _, answer in pairs]),
    )


def calibrations(questions: Sequence[Question], answers: Sequence[Answer]) -> Calibrations:
    """Every document of every answered question, and every best answer, beside what is so."""
    posteriors, holding, confidences, right = [], [], [], []
    for one, answer in zip(questions, answers, strict=True):
        if not answer.hypotheses:
            continue
        for document, share in zip(answer.documents, answer.best.document_posterior, strict=True):
            posteriors.append(share)
            holding.append(holds_answer(document, one))
        confidences.append(min(answer.best.probability, 1.0))
        right.append(exact_match(answer.text, one.answers))
    return Calibrations(calibration(posteriors, holding), calibration(confidences, right))


def holds_answer(document: RetrievedDocument, question: Question) -> bool:
    """By its key where the question names the documents; else whether an accepted answer stands in it, as words."""
    if question.keys:
        return document.key in question.keys
    words = f" {normalize_answer(f'{document.title} {document.text}')} "
    return any(f" {normalize_answer(answer)} " in words for answer in question.answers)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
