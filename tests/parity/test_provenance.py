"""What each token rests on, held against Hugging Face's tensors: output_attentions, and log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.types import (
    Compatibility,
    GenerationSettings,
    Hypothesis,
    SequenceDecoding,
    Strategy,
    Trace,
)
from tests.parity import cases, engine
from tests.parity.oracle import Batch, Question
from tests.parity.test_score import targets_of
from tests.parity.tiny_models import TinyRag, tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "mt5"]


@dataclass(frozen=True)
class Direct:
    """One answer by transformers' model: [tokens, n_docs] and, a document, [tokens, context length]."""

    log_probs: Tensor
    attention: list[Tensor]


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """transformers shows attention weights only while it does not fuse them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def direct(model: Any, question: Question, token_ids: Sequence[int]) -> Direct:
    """The generator run over each context alone, as a user of transformers would."""
    log_probs, attention = [], []
    targets = torch.tensor(token_ids[1:])
    with torch.no_grad(), eager(model):
        for context in question.contexts:
            outputs = model(
                input_ids=torch.tensor([context]),
                decoder_input_ids=torch.tensor([list(token_ids[:-1])]),
                output_attentions=True,
            )
            log_probs.append(outputs.logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0])
            attention.append(torch.stack(outputs.cross_attentions)[:, 0].mean((0, 1)))
    return Direct(torch.stack(log_probs, dim=1), attention)


def posterior(log_probs: Tensor, doc_scores: Sequence[float], strategy: Strategy) -> Tensor:
    """Bayes' rule written out, token by token: [tokens, n_docs]."""
    prior = torch.tensor(doc_scores).softmax(0)
    rows, seen = [], torch.ones_like(prior)
    for token in log_probs.exp():
        seen = token if strategy is Strategy.RAG_TOKEN else seen * token
        rows.append(prior * seen / (prior * seen).sum())
    return torch.stack(rows)


def table(values: bytes, columns: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(values, dtype="<f4").reshape(-1, columns)


def traced(requests: Sequence[Request]) -> list[Request]:
    return [Request(msgspec.structs.replace(r.work, trace=True)) for r in requests]


def answers(
    rag: TinyRag, batch: Batch, settings: GenerationSettings, strategy: Strategy, **options: Any
) -> list[list[Hypothesis]]:
    requests = traced(engine.requests_of(batch, settings, strategy, **options))
    return engine.answers_to(engine.new_runner(rag.backbone), requests)


def assert_traced(trace: Trace, expected: Direct, question: Question, strategy: Strategy) -> None:
    n_docs = len(question.contexts)
    np.testing.assert_allclose(table(trace.token_log_probs, n_docs), expected.log_probs, atol=1e-4)
    shares = posterior(expected.log_probs, question.doc_scores, strategy)
    np.testing.assert_allclose(table(trace.token_posterior, n_docs), shares, atol=1e-4)
    for token, weights in enumerate(trace.cross_attention):
        document = int(table(trace.token_posterior, n_docs)[token].argmax())
        theirs = expected.attention[document][token]
        np.testing.assert_allclose(np.frombuffer(weights, "<f4"), theirs, atol=1e-4)


@pytest.mark.parametrize("n_docs", [1, 3])
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", FAMILIES)
def test_traces_of_answers_are_hugging_face_s_tensors(family: str, strategy: Strategy, n_docs: int) -> None:
    rag = tiny_rag(family, n_docs)
    batch = cases.random_batch(rag, 31 + n_docs, n_docs=n_docs, size=3)
    settings = cases.plain_settings(rag, num_beams=3, num_return_sequences=3, max_length=8)
    for question, hypotheses in zip(batch.questions, answers(rag, batch, settings, strategy), strict=True):
        for hypothesis in hypotheses:
            assert hypothesis.trace is not None
            expected = direct(rag.generator, question, hypothesis.token_ids)
            if strategy is Strategy.RAG_SEQUENCE:  # a generated pad does not count, as in get_nll
                pads = torch.tensor(hypothesis.token_ids[1:]) == rag.pad_token_id
                expected.log_probs[pads] = 0.0
            assert_traced(hypothesis.trace, expected, question, strategy)


@pytest.mark.parametrize("decoder", ["auto", "general"])
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_trace_of_a_given_answer_is_hugging_face_s_tensors(
    family: str, strategy: Strategy, decoder: str
) -> None:
    rag = tiny_rag(family, 2, decoder)
    batch = cases.random_batch(rag, 8, n_docs=4, size=1)
    labels = [rag.decoder_start_token_id, 9, 8, 7, 11, rag.eos_token_id]
    padded = [[*labels, rag.pad_token_id]]
    (target,) = targets_of(rag, batch, padded, strategy, compatibility=Compatibility.MASKED)
    (score,) = engine.score(rag.backbone, [msgspec.structs.replace(target, trace=True)])
    assert score.trace is not None
    trace, question = score.trace, batch.questions[0]
    log_probs = table(trace.token_log_probs, 4)
    assert not log_probs[-1].any(), "a pad says nothing"
    cut = Trace(
        token_log_probs=log_probs[:-1].tobytes(),
        token_posterior=table(trace.token_posterior, 4)[:-1].tobytes(),
        cross_attention=trace.cross_attention[:-1],
    )
    assert_traced(cut, direct(rag.generator, question, labels), question, strategy)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_posterior_of_an_answer_follows_from_its_tokens(family: str, strategy: Strategy) -> None:
    """RAG-Sequence: the last token's; RAG-Token: the mean over tokens that were not forced."""
    rag = tiny_rag(family, 0)
    batch = cases.random_batch(rag, 9, n_docs=4, size=2)
    forced = {"forced_bos_token_id": 7, "forced_eos_token_id": rag.eos_token_id}
    settings = cases.plain_settings(rag, num_beams=3, num_return_sequences=2, max_length=6, **forced)
    for hypotheses in answers(rag, batch, settings, strategy):
        for one in hypotheses:
            assert one.trace is not None
            rows = table(one.trace.token_posterior, 4)
            counted = table(one.trace.token_log_probs, 4).any(axis=1)
            assert strategy is Strategy.RAG_SEQUENCE or not counted[0], "the forced token asks no document"
            whole = rows[-1] if strategy is Strategy.RAG_SEQUENCE else rows[counted].mean(0)
            assert one.document_posterior == pytest.approx(whole.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"decoding": SequenceDecoding.FAST}, {"compatibility": Compatibility.HF}]
)
def test_tracing_changes_no_answer(options: dict[str, Any]) -> None:
    rag = tiny_rag("bart", 1)
    batch = cases.random_batch(rag, 12, n_docs=3, size=3)
    settings = cases.plain_settings(rag, num_beams=3, num_return_sequences=3, max_length=8)
    for strategy in Strategy:
        requests = engine.requests_of(batch, settings, strategy, **options)
        plain = engine.answers_to(engine.new_runner(rag.backbone), requests)
        with_traces = answers(rag, batch, settings, strategy, **options)
        assert [[msgspec.structs.replace(h, trace=None) for h in q] for q in with_traces] == plain


def test_traced_answers_do_not_depend_on_their_company() -> None:
    rag = tiny_rag("t5", 1)
    batch = cases.random_batch(rag, 4, n_docs=3, size=4)
    settings = cases.plain_settings(rag, do_sample=True, max_length=8, seed=5, num_return_sequences=3)
    together = answers(rag, batch, settings, Strategy.RAG_TOKEN)
    for question, found in zip(batch.questions, together, strict=True):
        (alone,) = answers(rag, Batch([question], rag.pad_token_id), settings, Strategy.RAG_TOKEN)
        assert [h.token_ids for h in found] == [h.token_ids for h in alone]
        for mine, other in zip(found, alone, strict=True):
            assert mine.trace is not None
            assert other.trace is not None
            ours, theirs = table(mine.trace.token_posterior, 3), table(other.trace.token_posterior, 3)
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_question_can_leave_while_its_trace_waits() -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 1, n_docs=2, size=2)
    settings = cases.plain_settings(rag, max_length=3)
    leaver, stayer = traced(engine.requests_of(batch, settings, Strategy.RAG_TOKEN))
    runner = engine.new_runner(rag.backbone)
    runner.execute(Schedule(admit=[leaver, stayer]))
    runner.execute(Schedule())  # both are answered, and their traces wait for the next step
    outcome = runner.execute(Schedule(dropped=[leaver]))
    assert [request for request, _ in outcome.answered] == [stayer]
