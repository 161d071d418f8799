"""Forward over the whole stack: questions in, every output of Hugging Face's classes out."""

import numpy as np
import pytest
import torch

from rag_client import (
    BusyError,
    Contexts,
    EncoderOutputs,
    ForwardOutputs,
    InvalidRequestError,
    NotFoundError,
    QuestionTokens,
    RagClient,
    Strategy,
)
from tests.integration.conftest import TinyPair
from tests.integration.test_pair import hugging_face, tensors
from tests.integration.tiny_pair import DIMENSION, MAX_COMBINED_LENGTH, N_DOCS, QUESTIONS, tokenizer

LABELS = np.array([[2, 0, 9, 10, 2], [2, 0, 11, 2, 1], [2, 0, 12, 13, 2]])


def question_tokens() -> QuestionTokens:
    encoded = tokenizer()(QUESTIONS, padding=True, return_tensors="np")
    return QuestionTokens(encoded["input_ids"], encoded["attention_mask"])


def contexts_of(outputs: ForwardOutputs) -> Contexts:
    assert outputs.context_input_ids is not None
    assert outputs.context_attention_mask is not None
    assert outputs.doc_scores is not None
    return Contexts(outputs.context_input_ids, outputs.context_attention_mask, outputs.doc_scores)


def close(ours: object, theirs: torch.Tensor) -> None:
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("n_docs", [1, 3])
def test_questions_give_what_hugging_face_gives_for_their_contexts(
    pair: TinyPair, client: RagClient, strategy: Strategy, n_docs: int
) -> None:
    ours = client.forward(
        question_tokens(),
        model_class=strategy.value,
        n_docs=n_docs,
        labels=LABELS,
        output_retrieved=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    model = hugging_face(pair.checkpoint, strategy)
    model.rag.generator.set_attn_implementation("eager")
    given = tensors(contexts_of(ours))
    with torch.no_grad():
        theirs = model(**given, labels=torch.from_numpy(LABELS), n_docs=n_docs, output_attentions=True)
        question = model.question_encoder(
            torch.from_numpy(question_tokens().input_ids),
            attention_mask=torch.from_numpy(np.asarray(question_tokens().attention_mask)),
        )[0]
    assert ours.n_docs == n_docs
    assert ours.context_input_ids is not None
    assert ours.context_input_ids.shape == (3 * n_docs, MAX_COMBINED_LENGTH)
    close(ours.loss, theirs.loss)
    close(ours.logits, theirs.logits)
    close(ours.question_encoder_last_hidden_state, question)
    close(ours.generator_enc_last_hidden_state, theirs.generator_enc_last_hidden_state)
    for name in ("generator_enc_attentions", "generator_dec_attentions", "generator_cross_attentions"):
        for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            close(mine, other)
    assert len(ours.generator_dec_hidden_states) == len(ours.generator_enc_hidden_states) == 3
    assert len(ours.question_enc_hidden_states) == 2
    assert len(ours.question_enc_attentions) == 1
    assert ours.retrieved_doc_embeds is not None
    assert ours.retrieved_doc_embeds.shape == (3, n_docs, DIMENSION)
    products = torch.bmm(question.unsqueeze(1), torch.from_numpy(ours.retrieved_doc_embeds).transpose(1, 2))
    close(ours.doc_scores, products.squeeze(1))
    found = client.retrieve(question_tokens(), n_docs=n_docs)
    np.testing.assert_array_equal(ours.retrieved_doc_ids, found.retrieved_doc_ids)


def test_an_output_mask_returns_what_it_names(client: RagClient) -> None:
    ours = client.forward(QUESTIONS, labels=LABELS, outputs=["loss", "generator_cross_attentions"])
    assert ours.loss is not None
    assert len(ours.generator_cross_attentions) == 2
    assert ours.logits is None
    assert ours.generator_enc_last_hidden_state is None
    assert ours.past_key_values == ""


def test_outputs_larger_than_a_message_come_in_pieces(client: RagClient) -> None:
    """gRPC's own limit is 4 MiB a message."""
    width, batch, heads = 64, 32, 2
    contexts = Contexts(
        np.full((batch * 3, width), 7), np.ones((batch * 3, width), int), np.zeros((batch, 3), np.float32)
    )
    labels = np.tile(np.array([[2, *range(5, 35)]]), (batch, 1))
    ours = client.forward(contexts, labels=labels, output_attentions=True)
    expected_bytes = 2 * batch * 3 * heads * width * width * 4
    assert sum(one.nbytes for one in ours.generator_enc_attentions) == expected_bytes > 4 * 2**20
    assert all(np.allclose(one.sum(-1), 1, atol=1e-4) for one in ours.generator_enc_attentions)


def test_past_key_values_are_a_handle(pair: TinyPair, client: RagClient) -> None:
    found = client.retrieve(QUESTIONS, n_docs=2).contexts()
    whole = client.forward(found, decoder_input_ids=LABELS, model_class="RAG_MODEL")
    first = client.forward(found, decoder_input_ids=LABELS[:, :3], model_class="RAG_MODEL", use_cache=True)
    assert first.past_key_values_expires_s == 60.0
    rest = client.forward(
        None, decoder_input_ids=LABELS[:, 3:], model_class="RAG_MODEL", past_key_values=first.past_key_values
    )
    assert whole.logits is not None
    close(np.concatenate([first.logits, rest.logits], axis=1), torch.from_numpy(whole.logits))
    client.release_past_key_values(first.past_key_values)
    for lost, why in (
        (first.past_key_values, "it was released"),
        ("0.abc-def", "worker was restarted"),
        ("9.abc", "no handle of this service"),
    ):
        with pytest.raises(NotFoundError, match=why) as refused:
            client.forward(None, decoder_input_ids=LABELS[:, 3:], past_key_values=lost)
        assert refused.value.reason == "PAST_KEY_VALUES_LOST"
        with pytest.raises(NotFoundError, match=why):
            client.release_past_key_values(lost)


def test_handles_are_bounded_in_number(client: RagClient) -> None:
    found = client.retrieve("ti", n_docs=1).contexts()

    def hold() -> str:
        options = {"decoder_input_ids": LABELS[:1, :1], "use_cache": True, "outputs": ["doc_scores"]}
        return client.forward(found, **options).past_key_values  # type: ignore[arg-type]

    held = [hold() for _ in range(64)]
    with pytest.raises(BusyError, match="64 of 268435456 bytes are allowed"):
        hold()
    for handle in held:
        client.release_past_key_values(handle)


def test_encoder_outputs_are_taken(client: RagClient) -> None:
    found = client.retrieve(QUESTIONS).contexts()
    whole = client.forward(found, labels=LABELS)
    assert whole.generator_enc_last_hidden_state is not None
    encoded = EncoderOutputs(
        whole.generator_enc_last_hidden_state, found.doc_scores, found.context_attention_mask
    )
    again = client.forward(encoded, labels=LABELS)
    assert whole.loss is not None
    close(again.loss, torch.from_numpy(whole.loss))


def _contexts(**changes: np.ndarray) -> Contexts:
    plain = {
        "context_input_ids": np.full((N_DOCS, 4), 7),
        "context_attention_mask": np.ones((N_DOCS, 4), int),
        "doc_scores": np.zeros((1, N_DOCS), np.float32),
    }
    return Contexts(**(plain | changes))  # type: ignore[arg-type]


ONE = LABELS[:1]
HIDDEN = np.zeros((N_DOCS, 4, 32), np.float32)
SCORES = np.zeros((1, N_DOCS), np.float32)
REFUSALS = [
    (_contexts(), {"labels": ONE, "outputs": ["logits", "secret"]}, "output_mask.paths[1]"),
    (_contexts(), {"labels": ONE + 60}, "labels"),
    (_contexts(), {"labels": LABELS}, "labels"),
    (_contexts(), {"labels": ONE, "decoder_input_ids": ONE[:, :2]}, "labels"),
    (_contexts(), {"labels": ONE, "label_smoothing": 1.0}, "label_smoothing"),
    (_contexts(), {"labels": ONE, "decoder_attention_mask": ONE}, "decoder_attention_mask"),
    (_contexts(), {"decoder_input_ids": np.full((1, 65), 7)}, "decoder_input_ids"),
    (_contexts(context_input_ids=np.full((N_DOCS, 4), 99)), {"labels": ONE}, "contexts.context_input_ids"),
    (_contexts(context_input_ids=np.full((2, 4), 7)), {"labels": ONE}, "contexts.context_input_ids"),
    (
        _contexts(context_attention_mask=np.full((N_DOCS, 4), 2)),
        {"labels": ONE},
        "contexts.context_attention_mask",
    ),
    (
        _contexts(context_attention_mask=np.zeros((N_DOCS, 4), int)),
        {"labels": ONE},
        "contexts.context_attention_mask[0]",
    ),
    (_contexts(doc_scores=np.full((1, N_DOCS), np.nan, np.float32)), {"labels": ONE}, "contexts.doc_scores"),
    (EncoderOutputs(HIDDEN[:, :, :8], SCORES), {"labels": ONE}, "encoder_outputs.last_hidden_state"),
    (EncoderOutputs(HIDDEN * np.nan, SCORES), {"labels": ONE}, "encoder_outputs.last_hidden_state"),
    (EncoderOutputs(HIDDEN, SCORES), {}, "decoder_input_ids"),
    (None, {"labels": ONE}, "input"),
    (QUESTIONS, {"labels": LABELS, "n_docs": 1000}, "retrieval_config.n_docs"),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_what_is_wrong_is_named(client: RagClient, case: int) -> None:
    given, options, field = REFUSALS[case]
    with pytest.raises(InvalidRequestError) as refused:
        client.forward(given, **options)  # type: ignore[arg-type]
    assert [one.field for one in refused.value.field_violations] == [field]


def test_more_bytes_than_a_pass_may_return_are_refused_with_both_numbers(client: RagClient) -> None:
    rows = 64 * 100
    contexts = Contexts(np.full((rows, 64), 7), np.ones((rows, 64), int), np.zeros((64, 100), np.float32))
    labels = np.full((64, 30), 7)
    with pytest.raises(InvalidRequestError, match="and a forward pass may return 268435456"):
        client.forward(contexts, labels=labels, output_attentions=True)


def test_documents_that_are_not_there_take_no_part(client: RagClient) -> None:
    """A fully masked row is not a number in attention, and would spread by the mixture."""
    contexts = _contexts(
        context_attention_mask=np.array([[1] * 4, [1] * 4, [0] * 4]),
        doc_scores=np.array([[0.0, 1.0, -np.inf]], np.float32),
    )
    two = Contexts(
        contexts.context_input_ids[:2], contexts.context_attention_mask[:2], contexts.doc_scores[:, :2]
    )
    for model_class in ("RAG_TOKEN", "RAG_SEQUENCE"):
        all_three = client.forward(contexts, labels=ONE, model_class=model_class)  # type: ignore[arg-type]
        present = client.forward(two, labels=ONE, model_class=model_class)  # type: ignore[arg-type]
        assert present.loss is not None
        close(all_three.loss, torch.from_numpy(present.loss))
