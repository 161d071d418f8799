"""The running pair: what it answers, held against Hugging Face on the contexts that its retriever returned."""

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rag_client import (
    GENERATOR_SERVICE,
    RETRIEVER_SERVICE,
    AsyncRagClient,
    Contexts,
    Generation,
    Health,
    QuestionTokens,
    RagClient,
    RefusedError,
    Strategy,
    TimedOutError,
)
from rag_client.cli import app
from rag_client.options import GenerateOptions
from tests.integration.conftest import TinyPair
from tests.integration.tiny_pair import ARGUMENTS, EMBEDDING_MODEL, N_DOCS, QUESTIONS, tokenizer

EOS = 2
CASES = [
    {"max_length": 12},
    {"max_length": 12, "num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    {"max_length": 14, "num_beams": 4, "min_length": 5, "length_penalty": 0.5, "no_repeat_ngram_size": 2},
    {"max_length": 10, "num_beams": 2, "repetition_penalty": 1.4, "bad_words_ids": [[9], [10, 11]]},
]


@functools.cache
def hugging_face(checkpoint: Path, strategy: Strategy) -> Any:
    from transformers import RagSequenceForGeneration, RagTokenForGeneration

    kind = RagTokenForGeneration if strategy is Strategy.RAG_TOKEN else RagSequenceForGeneration
    return kind.from_pretrained(checkpoint).eval()


def tensors(contexts: Contexts) -> dict[str, torch.Tensor]:
    return {
        "context_input_ids": torch.from_numpy(contexts.context_input_ids),
        "context_attention_mask": torch.from_numpy(contexts.context_attention_mask),
        "doc_scores": torch.from_numpy(contexts.doc_scores),
    }


def trimmed(row: list[int]) -> list[int]:
    """A row up to its first end token; the start token is one too."""
    ends = [place for place, token in enumerate(row) if token == EOS and place > 0]
    return row[: ends[0] + 1] if ends else row


def token_ids(generation: Generation) -> list[list[int]]:
    return [one.token_ids for answer in generation.answers for one in answer.hypotheses]


def assert_same_answers(ours: Generation, theirs: Generation) -> None:
    assert token_ids(ours) == token_ids(theirs)
    for mine, other in zip(ours.answers, theirs.answers, strict=True):
        for one, two in zip(mine.hypotheses, other.hypotheses, strict=True):
            assert one.text == two.text
            assert one.score == pytest.approx(two.score, abs=1e-4)
            assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-4)
            assert one.document_posterior == pytest.approx(two.document_posterior, abs=1e-4)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("n_docs", [1, 3])
def test_rag_token_answers_as_hugging_face(pair: TinyPair, client: RagClient, case: int, n_docs: int) -> None:
    found = client.retrieve(QUESTIONS, n_docs=n_docs)
    model = hugging_face(pair.checkpoint, Strategy.RAG_TOKEN)
    theirs = model.generate(**tensors(found.contexts()), n_docs=n_docs, **CASES[case])
    ours = client.generate(QUESTIONS, n_docs=n_docs, strategy="RAG_TOKEN", **CASES[case])
    assert token_ids(ours) == [trimmed(row) for row in theirs.tolist()]
    assert not ours.strategy_differs_from_checkpoint


@pytest.mark.parametrize("case", range(len(CASES)))
def test_rag_sequence_answers_as_hugging_face_quirks_included(
    pair: TinyPair, client: RagClient, case: int
) -> None:
    contexts = client.retrieve(QUESTIONS).contexts()
    model = hugging_face(pair.checkpoint, Strategy.RAG_SEQUENCE)
    arguments = {"num_return_sequences": 1, **CASES[case]}
    theirs = model.generate(**tensors(contexts), n_docs=N_DOCS, **arguments)
    ours = client.generate(contexts, strategy="RAG_SEQUENCE", compatibility="HF", **arguments)
    assert token_ids(ours) == [trimmed(row) for row in theirs.tolist()]
    assert ours.strategy_differs_from_checkpoint
    assert ours.compatibility == "HF"


def test_rag_sequence_masked_answers_as_hugging_face_with_the_mask_put_in(
    pair: TinyPair, client: RagClient
) -> None:
    from generator_service.types import GenerationSettings
    from tests.parity import oracle

    found = client.retrieve(QUESTIONS)
    lengths = found.contexts().context_attention_mask.sum(axis=1).reshape(len(QUESTIONS), N_DOCS)
    rows = found.contexts().context_input_ids.reshape(len(QUESTIONS), N_DOCS, -1)
    questions = [
        oracle.Question(
            [rows[i, j, : lengths[i, j]].tolist() for j in range(N_DOCS)], found.doc_scores[i].tolist()
        )
        for i in range(len(QUESTIONS))
    ]
    settings = GenerationSettings(
        **ARGUMENTS, bos_token_id=0, pad_token_id=1, eos_token_ids=(EOS,), decoder_start_token_id=EOS
    )
    model = oracle.MathematicalRagSequence.from_pretrained(pair.checkpoint).eval()
    theirs = oracle.rag_sequence(model, oracle.Batch(questions, 1), settings, masked=True)
    ours = client.generate(QUESTIONS, strategy="RAG_SEQUENCE", **ARGUMENTS)
    assert ours.compatibility == "MASKED"
    assert token_ids(ours) == [one.token_ids for answers in theirs for one in answers]
    scores = [one.score for answer in ours.answers for one in answer.hypotheses]
    assert scores == pytest.approx([one.score for answers in theirs for one in answers], abs=1e-4)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_texts_tokens_and_contexts_give_the_same_answers(client: RagClient, strategy: Strategy) -> None:
    by_text = client.generate(QUESTIONS, strategy=strategy, **ARGUMENTS)
    encoded = tokenizer()(QUESTIONS, padding=True, return_tensors="np")
    tokens = QuestionTokens(encoded["input_ids"], encoded["attention_mask"])
    assert_same_answers(client.generate(tokens, strategy=strategy, **ARGUMENTS), by_text)

    states = client.encode_questions(tokens)
    np.testing.assert_allclose(states, client.encode_questions(QUESTIONS), atol=1e-6)
    found = client.retrieve(QUESTIONS, states)
    contexts = found.contexts()
    in_three_steps = client.generate_from_contexts(
        contexts.context_input_ids,
        contexts.context_attention_mask,
        contexts.doc_scores,
        strategy=strategy,
        **ARGUMENTS,
    )
    assert_same_answers(in_three_steps, by_text)
    assert in_three_steps.index_generation == 0
    assert by_text.index_generation == found.generation == 1


def test_a_batch_answers_as_its_questions_alone(client: RagClient) -> None:
    together = client.generate(QUESTIONS, **ARGUMENTS)
    for place, question in enumerate(QUESTIONS):
        alone = client.generate(question, **ARGUMENTS)
        assert token_ids(alone) == [one.token_ids for one in together.answers[place].hypotheses]


async def test_concurrent_requests_of_all_kinds_answer_as_they_do_alone(pair: TinyPair) -> None:
    kinds: list[GenerateOptions] = [
        {"max_length": 5},
        {"max_length": 12, "num_beams": 3, "strategy": "RAG_TOKEN"},
        {"max_length": 9, "num_beams": 2, "strategy": "RAG_SEQUENCE", "n_docs": 2},
        {"max_length": 12, "do_sample": True, "top_k": 0, "seed": 5},
        {"max_length": 7, "num_beams": 4, "compatibility": "HF", "strategy": "RAG_SEQUENCE"},
    ]
    calls = [(question, options) for question in QUESTIONS for options in kinds] * 2
    async with AsyncRagClient(pair.generator.grpc, timeout_s=60) as client:
        alone = [await client.generate(question, **options) for question, options in calls[: len(calls) // 2]]
        together = await asyncio.gather(
            *(client.generate(question, **options) for question, options in calls)
        )
    for one, other in zip(alone * 2, together, strict=True):
        assert token_ids(one) == token_ids(other)


async def test_work_that_nobody_waits_for_any_more_does_not_stop_the_rest(pair: TinyPair) -> None:
    async with AsyncRagClient(pair.generator.grpc, timeout_s=60) as client:
        abandoned = [
            asyncio.create_task(client.generate(QUESTIONS * 10, max_length=60, min_length=59, num_beams=8))
            for _ in range(3)
        ]
        await asyncio.sleep(0.3)
        for task in abandoned[:2]:
            task.cancel()
        with pytest.raises(TimedOutError):
            await client.generate(QUESTIONS * 10, max_length=60, min_length=59, num_beams=8, timeout_s=0.2)
        assert (await client.generate("ti", max_length=5)).answers[0].hypotheses
        assert len((await abandoned[2]).answers) == 30
        outcomes = await asyncio.gather(*abandoned[:2], return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in outcomes)


def test_doc_scores_are_the_inner_products(client: RagClient) -> None:
    states = client.encode_questions(QUESTIONS)
    found = client.retrieve(QUESTIONS, states, include_retrieved_doc_embeds=True)
    assert found.retrieved_doc_embeds is not None
    products = np.einsum("bd,bnd->bn", states, found.retrieved_doc_embeds)
    np.testing.assert_allclose(found.doc_scores, products, rtol=1e-5, atol=1e-5)


def test_answers_come_with_documents_posterior_and_provenance(client: RagClient) -> None:
    found = client.retrieve(QUESTIONS, include_documents=True)
    generation = client.generate(QUESTIONS, include_documents=True, **ARGUMENTS)
    assert found.documents is not None
    for place, answer in enumerate(generation.answers):
        assert [one.key for one in answer.documents] == [one.key for one in found.documents[place]]
        scores = [one.doc_score for one in answer.documents]
        assert scores == pytest.approx(found.doc_scores[place].tolist(), abs=1e-5)
        prior = np.exp(scores) / np.exp(scores).sum()
        assert [one.prior for one in answer.documents] == pytest.approx(prior.tolist(), abs=1e-5)
        assert sum(answer.best.document_posterior) == pytest.approx(1.0, abs=1e-5)
        for one in answer.hypotheses:
            if one.span is not None:
                text = answer.documents[one.span.document].text
                assert text[one.span.start : one.span.end] == one.span.text
    assert generation.usage.question_tokens == sum(len(q.replace(" ", "")) + 2 for q in QUESTIONS)
    assert generation.usage.generated_tokens > 0
    assert generation.timings.total_s > 0


@pytest.mark.parametrize("strategy", list(Strategy))
def test_score_gives_the_loss_of_hugging_face(pair: TinyPair, client: RagClient, strategy: Strategy) -> None:
    contexts = client.retrieve(QUESTIONS).contexts()
    labels = np.array([[9, 5, 2, 1], [12, 13, 14, 2], [30, 2, 1, 1]])
    ours = client.score(contexts, labels, strategy=strategy, compatibility="HF")
    with torch.no_grad():
        theirs = hugging_face(pair.checkpoint, strategy)(
            **tensors(contexts), labels=torch.from_numpy(labels), n_docs=N_DOCS
        )
    np.testing.assert_allclose(ours.loss, theirs.loss.numpy(), atol=1e-4)


def test_the_score_of_an_answer_is_its_log_likelihood(client: RagClient) -> None:
    generation = client.generate(QUESTIONS, **ARGUMENTS)
    best = [answer.best for answer in generation.answers]
    width = max(len(one.token_ids) for one in best)
    labels = np.array([one.token_ids + [1] * (width - len(one.token_ids)) for one in best])
    scores = client.score(QUESTIONS, labels)
    assert scores.log_likelihoods.tolist() == pytest.approx([one.log_likelihood for one in best], abs=1e-4)
    for one, posterior in zip(best, scores.document_posterior.tolist(), strict=True):
        assert one.document_posterior == pytest.approx(posterior, abs=1e-4)


def test_sampling_repeats_with_its_seed(client: RagClient) -> None:
    first = client.generate(QUESTIONS, do_sample=True, max_length=12, top_k=0)
    assert first.seed != 0
    again = client.generate(QUESTIONS, do_sample=True, max_length=12, top_k=0, seed=first.seed)
    assert token_ids(again) == token_ids(first)


def test_fewer_documents_than_asked_are_reported_not_padded(client: RagClient) -> None:
    found = client.retrieve("bako", n_docs=20, include_documents=True)
    assert found.n_docs_found == [9]
    assert found.doc_scores.shape == (1, 9)
    answer = client.generate("bako", n_docs=20, include_documents=True, max_length=8).answers[0]
    assert answer.n_docs == len(answer.documents) == len(answer.best.document_posterior) == 9


def test_both_sides_describe_themselves_and_agree(pair: TinyPair, client: RagClient) -> None:
    model, index = client.get_model(), client.get_index()
    assert (model.architecture, model.generator_type, model.decoder) == (
        "RagTokenForGeneration",
        "bart",
        "bart",
    )
    assert (model.question_encoder_type, model.dtype, model.devices) == ("dpr", "float32", ["cpu"])
    assert model.default_strategy is Strategy.RAG_TOKEN
    assert model.default_n_docs == index.default_n_docs == N_DOCS
    assert model.retrieval_vector_size == index.dimension
    assert model.context_tokenizer_digest == index.context_tokenizer_digest
    assert model.checkpoint_digest == client.generate("ti", max_length=4).checkpoint_digest
    assert (index.ntotal, index.kind, index.metric) == (9, "Flat", "INNER_PRODUCT")
    assert (index.embedding_model, index.devices) == (EMBEDDING_MODEL, ["cpu"])
    documents = client.get_documents(keys=["d3", "nope"], rows=[3, 99])
    assert [one.key for one in documents.documents] == ["d3", "d3"]
    assert (documents.missing_keys, documents.missing_rows) == (["nope"], [99])


def test_health_reflection_and_side_ports(pair: TinyPair, client: RagClient) -> None:
    import grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    assert client.health() == {GENERATOR_SERVICE: Health.SERVING, RETRIEVER_SERVICE: Health.SERVING}
    for service, name in ((pair.generator, GENERATOR_SERVICE), (pair.retriever, RETRIEVER_SERVICE)):
        with grpc.insecure_channel(service.grpc) as channel:
            listed = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {name, "grpc.health.v1.Health"} <= listed
        assert service.readyz() == (200, "ok\n")
        assert service.get("/livez")[0] == 200
        status, metrics = service.get("/metrics")
        assert status == 200
        side = "generator" if service is pair.generator else "retriever"
        assert f"rag_{side}_" in metrics


def test_the_rag_command_asks_the_pair(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_CLIENT_GENERATOR", pair.generator.grpc)
    monkeypatch.setenv("RAG_CLIENT_RETRIEVER", pair.retriever.grpc)
    runner = CliRunner()
    asked = runner.invoke(app, ["ask", QUESTIONS[0], "--json"])
    assert asked.exit_code == 0, asked.stderr
    assert len(json.loads(asked.output)["answers"][0]["documents"]) == N_DOCS
    for arguments in (["ask", QUESTIONS[0]], ["retrieve", "ti"], ["score", "ti", "bako"], ["status"]):
        shown = runner.invoke(app, arguments)
        assert shown.exit_code == 0, shown.stderr
        assert shown.output.strip()


def test_filter_and_score_threshold_choose_the_documents_behind_an_answer(client: RagClient) -> None:
    found = client.retrieve("bako", n_docs=9, include_documents=True)
    keys = [document.key for document in found.documents[0]]
    chosen = {"number": {"$gte": 3, "$lt": 6}}
    answer = client.generate("bako", n_docs=9, filter=chosen, include_documents=True, max_length=5).answers[0]
    assert [document.key for document in answer.documents] == [
        key for key in keys if key in {"d3", "d4", "d5"}
    ]
    threshold = float(found.doc_scores[0, 1])
    answer = client.generate(
        "bako", n_docs=9, score_threshold=threshold, rescore_factor=2, include_documents=True, max_length=5
    ).answers[0]
    assert [document.key for document in answer.documents] == keys[:2]
    with pytest.raises(RefusedError, match="no document"):
        client.generate("bako", filter={"number": 99}, max_length=5)
