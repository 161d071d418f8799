"""Provenance, explanations, abstention and pinning through the running pair, held against Hugging Face's tensors."""

import json
import math
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RagTokenForGeneration

from rag_client import (
    Answer,
    Contexts,
    Generation,
    Hypothesis,
    InvalidRequestError,
    RagClient,
    RefusedError,
    Strategy,
)
from tests.integration.conftest import TinyPair
from tests.integration.tiny_pair import N_DOCS, QUESTIONS, tokenizer

PAD, START = 1, 2
ARGUMENTS: dict[str, Any] = {"max_length": 10, "num_beams": 3, "n_docs": N_DOCS}


@pytest.fixture(scope="module")
def generator(pair: TinyPair) -> Any:
    model = RagTokenForGeneration.from_pretrained(pair.checkpoint).eval().generator
    model.set_attn_implementation("eager")  # transformers shows no weights of its fused attention
    return model


def direct(generator: Any, contexts: Contexts, question: int, token_ids: Sequence[int]) -> tuple[Any, Any]:
    """log p(token | prefix, document) [tokens, n_docs], and cross-attention [n_docs, tokens, width]."""
    rows = slice(question * N_DOCS, (question + 1) * N_DOCS)
    targets = torch.tensor(token_ids[1:])
    with torch.no_grad():
        outputs = generator(
            input_ids=torch.from_numpy(contexts.context_input_ids[rows]),
            attention_mask=torch.from_numpy(contexts.context_attention_mask[rows]),
            decoder_input_ids=torch.tensor([list(token_ids[:-1])] * N_DOCS),
            output_attentions=True,
        )
    chosen = outputs.logits.log_softmax(-1)[:, torch.arange(len(targets)), targets].T
    if PAD in token_ids:
        chosen = chosen.masked_fill((targets == PAD)[:, None], 0.0)
    return chosen.double().numpy(), torch.stack(outputs.cross_attentions).mean((0, 2)).numpy()


def likelihood(log_probs: Any, doc_scores: Any, strategy: Strategy) -> float:
    """log p(answer | question), in probabilities: the paper's two sums as they are written."""
    prior = np.exp(doc_scores) / np.exp(doc_scores).sum()
    if strategy is Strategy.RAG_TOKEN:
        return float(np.log((np.exp(log_probs) * prior).sum(1)).sum())
    return float(np.log((np.exp(log_probs.sum(0)) * prior).sum()))


def shares(log_probs: Any, doc_scores: Any, strategy: Strategy) -> Any:
    seen = np.exp(log_probs if strategy is Strategy.RAG_TOKEN else log_probs.cumsum(0)) * np.exp(doc_scores)
    return seen / seen.sum(1, keepdims=True)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_provenance_is_hugging_face_s_posterior_and_attention(
    client: RagClient, generator: Any, strategy: Strategy
) -> None:
    found = client.retrieve(QUESTIONS, n_docs=N_DOCS)
    contexts = found.contexts()
    generation = client.generate(
        QUESTIONS, strategy=strategy, include_provenance=True, include_documents=True, **ARGUMENTS
    )
    for index, answer in enumerate(generation.answers):
        for one in answer.hypotheses:
            assert one.provenance is not None
            log_probs, attention = direct(generator, contexts, index, one.token_ids)
            expected = shares(log_probs, found.doc_scores[index].astype(np.float64), strategy)
            np.testing.assert_allclose(one.provenance.token_posterior, expected, atol=1e-4)
            assert "".join(source.text for source in one.provenance.tokens) == one.text
            for place, source in enumerate(one.provenance.tokens):
                assert source.token_id == one.token_ids[place + 1]
                assert source.document == int(one.provenance.token_posterior[place].argmax())
                assert_looked_at(answer, source, attention[source.document, place], contexts, index)


def assert_looked_at(answer: Answer, source: Any, weights: Any, contexts: Contexts, question: int) -> None:
    """The span is the run of text tokens whose weights are the most above the text's mean, by trying all."""
    text = answer.documents[source.document].text
    row = contexts.context_input_ids[question * N_DOCS + source.document].tolist()
    encoded = tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    (first,) = [at for at in range(len(row)) if row[at : at + len(ids)] == ids][:1]
    inside = weights[first : first + len(ids)]
    runs = [(s, e) for s in range(len(ids)) for e in range(s + 1, min(s + 8, len(ids)) + 1)]
    excess = {run: (inside[run[0] : run[1]] - inside.mean()).sum() for run in runs}
    mine = (source.context_start - first, source.context_end - first)
    assert excess[mine] == pytest.approx(max(excess.values()), abs=1e-5)
    assert (source.span.start, source.span.end) == (offsets[mine[0]][0], offsets[mine[1] - 1][1])
    assert source.attention == pytest.approx(inside[mine[0] : mine[1]].sum(), abs=1e-4)


def test_contexts_of_the_caller_s_give_places_in_the_context_alone(client: RagClient) -> None:
    found = client.retrieve(QUESTIONS[:1], n_docs=2).contexts()
    scores = np.array([[0.5, -np.inf, 0.25]], np.float32)
    three = Contexts(
        np.concatenate([found.context_input_ids, found.context_input_ids[:1]]),
        np.concatenate([found.context_attention_mask, found.context_attention_mask[:1]]),
        scores,
    )
    (answer,) = client.generate(three, include_provenance=True, max_length=6).answers
    assert answer.best.provenance is not None
    assert answer.best.provenance.token_posterior.shape == (len(answer.best.token_ids) - 1, 3)
    assert not answer.best.provenance.token_posterior[:, 1].any(), "a document that is not there has no part"
    for source in answer.best.provenance.tokens:
        assert source.span is None
        assert source.document != 1
        assert 0 <= source.context_start < source.context_end <= found.context_input_ids.shape[1]
    assert client.generate(three, max_length=6).answers[0].best.provenance is None


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_explanations_are_direct_computation(
    client: RagClient, generator: Any, strategy: Strategy, given: bool
) -> None:
    found = client.retrieve(QUESTIONS, n_docs=N_DOCS)
    contexts, scores = found.contexts(), found.doc_scores.astype(np.float64)
    labels = np.array([[START, 9, 8, 2], [START, 11, 2, PAD], [START, 12, 13, 14]])
    explained = client.explain(QUESTIONS, labels if given else None, strategy=strategy, **ARGUMENTS)
    best = client.generate(QUESTIONS, strategy=strategy, **ARGUMENTS)
    for index, one in enumerate(explained.explanations):
        wanted = labels[index][labels[index] != PAD].tolist() if given else best.answers[index].best.token_ids
        assert one.answer.token_ids == wanted
        assert one.answer.provenance is not None
        log_probs, _ = direct(generator, contexts, index, wanted)
        whole = likelihood(log_probs, scores[index], strategy)
        assert one.answer.log_likelihood == pytest.approx(whole, abs=1e-4)
        assert [left.document for left in one.left_out] == list(range(N_DOCS))
        for left in one.left_out:
            kept = [d for d in range(N_DOCS) if d != left.document]
            without = likelihood(log_probs[:, kept], scores[index, kept], strategy)
            assert left.log_likelihood == pytest.approx(without, abs=1e-4)
            assert left.change == pytest.approx(without - whole, abs=1e-4)
            rows = [index * N_DOCS + d for d in kept]
            fewer = Contexts(
                contexts.context_input_ids[rows],
                contexts.context_attention_mask[rows],
                found.doc_scores[index : index + 1, kept],
            )
            arguments = {name: value for name, value in ARGUMENTS.items() if name != "n_docs"}
            expected = client.generate(fewer, strategy=strategy, **arguments).answers[0].best
            assert left.answer is not None
            assert left.answer.token_ids == expected.token_ids
            assert left.answer.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert left.answer.document_posterior[left.document] == 0
            assert left.answer_differs == (expected.token_ids != best.answers[index].best.token_ids)


def test_explanations_can_skip_the_answers_and_live_with_one_document(client: RagClient) -> None:
    quick = client.explain(QUESTIONS[0], "bako", skip_answers=True, include_documents=True, n_docs=2)
    (one,) = quick.explanations
    assert one.answer.text == "bako"
    assert len(one.documents) == 2
    assert [left.answer for left in one.left_out] == [None, None]
    (alone,) = client.explain(QUESTIONS[0], n_docs=1).explanations
    (left,) = alone.left_out
    assert (left.log_likelihood, left.change, left.answer, left.answer_differs) == (None, None, None, False)


def test_refused_explanations_name_the_field(client: RagClient) -> None:
    for wrong, field in [
        ({"answers": ["a", "b"]}, "target_texts.texts"),
        ({"answers": np.array([[START, PAD]])}, "labels[0]"),
        ({"n_docs": -1}, "generate.retrieval_config.n_docs"),
        ({"abstain_below": 2.0}, "generate.abstain_below"),
    ]:
        with pytest.raises(InvalidRequestError) as error:
            client.explain(QUESTIONS[0], **wrong)
        assert error.value.field_violations[0].field == field
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(InvalidRequestError, match="abstain_below"):
            client.generate(QUESTIONS[0], abstain_below=value)
    nothing = {"allowed_sequences": [[5]], "suppress_tokens": [5, 2], "num_beams": 2}
    with pytest.raises(RefusedError, match="nothing to explain"):
        client.explain(QUESTIONS[0], **nothing)


def abstentions(pair: TinyPair) -> float:
    with urllib.request.urlopen(f"http://{pair.generator.http}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("rag_generator_abstentions_total{"))


def test_abstaining_withholds_the_answers_that_are_not_sure_and_counts_them(
    pair: TinyPair, client: RagClient
) -> None:
    free = client.generate(QUESTIONS, **ARGUMENTS)
    sure = [math.exp(answer.best.log_likelihood) for answer in free.answers]
    assert [answer.confidence for answer in free.answers] == pytest.approx(sure, rel=1e-5)
    assert not any(answer.abstained for answer in free.answers)
    limit = sorted(sure)[1]
    before = abstentions(pair)
    careful = client.generate(QUESTIONS, abstain_below=limit * 1.001, include_documents=True, **ARGUMENTS)
    for one, confidence in zip(careful.answers, sure, strict=True):
        assert one.abstained == (confidence < limit * 1.001)
        assert bool(one.hypotheses) != one.abstained
        assert one.confidence == pytest.approx(confidence, rel=1e-4)
        assert one.documents, "what it would rest on is still shown"
    assert abstentions(pair) == before + 2
    assert careful.answers[0].text == "" or not careful.answers[0].abstained


SAMPLED: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "max_length": 12, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 2, "max_length": 9, "strategy": "RAG_SEQUENCE", "n_docs": 2},
    {"num_beams": 3, "forced_eos_token_id": -1, "allowed_sequences": [[9, 8, 2], [7, 2]]},
]


def tokens(generation: Generation) -> list[list[list[int]]]:
    return [[one.token_ids for one in answer.hypotheses] for answer in generation.answers]


@pytest.mark.parametrize("arguments", SAMPLED)
def test_a_pinned_request_gives_the_same_tokens(client: RagClient, arguments: dict[str, Any]) -> None:
    first = client.generate(QUESTIONS, **arguments)
    kept = json.loads(json.dumps(first.pinned_request))
    again = client.generate(QUESTIONS, pinned_request=kept)
    assert tokens(again) == tokens(first)
    assert again.pinned_request == first.pinned_request
    assert kept["expected_checkpoint_digest"] == first.checkpoint_digest
    assert again.seed == first.seed


def test_a_request_pinned_elsewhere_is_refused(client: RagClient) -> None:
    digest = "sha256:" + "0" * 64
    for name, value in [
        ("expected_checkpoint_digest", digest),
        ("expected_index_generation", 99),
        ("expected_contexts_digest", digest),
    ]:
        with pytest.raises(RefusedError, match=name) as error:
            client.generate(QUESTIONS[0], **{name: value})
        assert error.value.reason == "PINNED_ELSEWHERE"
    pinned = client.generate(QUESTIONS[0]).pinned_request
    with pytest.raises(RefusedError, match="expected_contexts_digest"):
        client.generate(QUESTIONS[1], pinned_request=pinned)
    with pytest.raises(RefusedError, match="expected_index_generation"):
        client.generate(client.retrieve(QUESTIONS[:1]).contexts(), pinned_request=pinned)


def test_a_sampled_answer_does_not_depend_on_its_company(client: RagClient) -> None:
    """Alone, in a batch, and beside other requests: the seed draws the same tokens."""
    arguments = {"do_sample": True, "seed": 7, "temperature": 1.2, "max_length": 12}
    together = tokens(client.generate(QUESTIONS, **arguments))
    for question, found in zip(QUESTIONS, together, strict=True):
        assert tokens(client.generate(question, **arguments)) == [found]


def test_hypotheses_know_their_probability() -> None:
    assert Hypothesis([], "", 0.0, math.log(0.25), [], None).probability == pytest.approx(0.25)


def test_streamed_answers_have_provenance_too_and_cannot_abstain(client: RagClient) -> None:
    *pieces, last = client.generate_stream(QUESTIONS[0], include_provenance=True, max_length=8)
    assert isinstance(last, Generation)
    best = last.answers[0].best
    assert best.provenance is not None
    streamed = np.concatenate([one.document_posterior for one in pieces if not isinstance(one, Generation)])
    np.testing.assert_allclose(best.provenance.token_posterior, streamed, atol=1e-4)
    with pytest.raises(InvalidRequestError, match="use Generate") as error:
        list(client.generate_stream(QUESTIONS[0], abstain_below=0.5))
    assert error.value.field_violations[0].field == "generate.abstain_below"
