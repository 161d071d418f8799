"""The examples of Hugging Face's RAG documentation, with the construction line changed, beside its classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RagModel, RagRetriever, RagSequenceForGeneration, RagTokenForGeneration

from rag_client import NotFoundError
from rag_client.hf import (
    SERVICE,
    RemoteGradientError,
    RemoteRagModel,
    RemoteRagSequenceForGeneration,
    RemoteRagTokenForGeneration,
)
from rag_client.remote_index import RemoteIndex
from tests.integration.conftest import TinyPair
from tests.integration.tiny_pair import N_DOCS, QUESTIONS, tokenizer

PAIRS: dict[Any, Any] = {
    RemoteRagModel: RagModel,
    RemoteRagSequenceForGeneration: RagSequenceForGeneration,
    RemoteRagTokenForGeneration: RagTokenForGeneration,
}
GENERATING = [RemoteRagSequenceForGeneration, RemoteRagTokenForGeneration]
LABELS = torch.tensor([[2, 0, 9, 10, 2], [2, 0, 11, 2, 1], [2, 0, 12, 13, 2]])


@pytest.fixture(scope="module")
def retriever(pair: TinyPair, checkpoint: Path) -> Iterator[RagRetriever]:
    """Hugging Face's own, over our retriever service."""
    from transformers import RagConfig

    config = RagConfig.from_pretrained(checkpoint)
    index = RemoteIndex(pair.retriever.grpc)
    assert not index.is_initialized()
    yield RagRetriever(config, tokenizer(), tokenizer(), index=index)
    assert index.is_initialized()
    index.close()


@pytest.fixture(params=list(PAIRS), ids=lambda one: one.__name__)
def remote(request: pytest.FixtureRequest, pair: TinyPair) -> Iterator[Any]:
    model = request.param(pair.generator.grpc)
    yield model
    model.close()


def stock(pair: TinyPair, remote: Any, retriever: RagRetriever | None = None) -> Any:
    model = PAIRS[type(remote)].from_pretrained(pair.checkpoint, retriever=retriever).eval()
    generator = model.generator
    generator.set_attn_implementation("eager")
    return model


def inputs() -> dict[str, torch.Tensor]:
    encoded = tokenizer()(QUESTIONS, padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def targets(remote: Any) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids" if isinstance(remote, RemoteRagModel) else "labels": LABELS}


def assert_same(ours: Any, theirs: Any, *, but: tuple[str, ...] = ("past_key_values",)) -> None:
    assert type(ours) is type(theirs)
    for name in theirs.__dataclass_fields__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name in but or (isinstance(other, tuple) and other == (None,)):
            continue
        if other is None:
            assert mine is None or "question" in name or "hidden_states" in name, name
        elif isinstance(other, tuple):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
        else:
            torch.testing.assert_close(mine.detach(), torch.as_tensor(other), atol=1e-4, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["local", SERVICE])
def test_one_forward_call_with_a_retriever(
    pair: TinyPair, remote: Any, retriever: RagRetriever, kind: str
) -> None:
    remote.set_retriever(SERVICE if kind == SERVICE else retriever)
    arguments = {**inputs(), **targets(remote), "output_retrieved": True, "output_attentions": True}
    with torch.no_grad():
        theirs = stock(pair, remote, retriever)(**arguments, n_docs=2)
    ours = remote(**arguments, n_docs=2)
    assert_same(ours, theirs)
    assert ours.retrieved_doc_ids.shape == (3, 2)


def test_encode_retrieve_forward_apart(pair: TinyPair, remote: Any, retriever: RagRetriever) -> None:
    model = stock(pair, remote)
    found = []
    for one in (remote, model):
        with torch.no_grad():
            # 1. Encode
            question_hidden_states = one.question_encoder(**inputs())[0]
            # 2. Retrieve
            docs_dict = retriever(
                inputs()["input_ids"].numpy(), question_hidden_states.detach().numpy(), return_tensors="pt"
            )
            doc_scores = torch.bmm(
                question_hidden_states.unsqueeze(1), docs_dict["retrieved_doc_embeds"].float().transpose(1, 2)
            ).squeeze(1)
            # 3. Forward to generator
            outputs = one(
                context_input_ids=docs_dict["context_input_ids"],
                context_attention_mask=docs_dict["context_attention_mask"],
                doc_scores=doc_scores,
                decoder_input_ids=LABELS,
            )
        found.append(outputs)
    assert found[0].doc_scores.shape == (3, N_DOCS)
    assert_same(*found)


def test_questions_without_a_mask_lose_their_pads_as_in_dpr(pair: TinyPair) -> None:
    """DPR masks its own pads where no mask is given: attending to them would change the vectors."""
    ids = inputs()["input_ids"]
    assert (ids == tokenizer().pad_token_id).any()
    remote = RemoteRagModel(pair.generator.grpc)
    with torch.no_grad():
        theirs = stock(pair, remote).question_encoder(ids)[0]
    torch.testing.assert_close(remote.question_encoder(ids)[0].detach(), theirs, atol=1e-5, rtol=1e-5)
    remote.close()


def trimmed(rows: torch.Tensor) -> list[list[int]]:
    """Without the pads, and what HF puts after the end: widths differ (docs/parity.md, 10)."""
    out = []
    for row in rows.tolist():
        while row and row[-1] == 1:
            row.pop()
        out.append(row)
    return out


@pytest.mark.parametrize("made", GENERATING)
@pytest.mark.parametrize("how", ["contexts", "local", SERVICE])
def test_generate_as_hugging_face(pair: TinyPair, retriever: RagRetriever, made: Any, how: str) -> None:
    remote = made(pair.generator.grpc, SERVICE if how == SERVICE else retriever)
    model = stock(pair, remote, retriever)
    arguments: dict[str, Any] = {"num_beams": 3, "max_length": 12, "num_return_sequences": 2}
    # transformers scores without the question's mask (docs/parity.md, 6): one question has no pads
    given: dict[str, Any] = dict(tokenizer()(QUESTIONS[:1], return_tensors="pt"))
    given.pop("token_type_ids", None)
    if how == "contexts":
        hidden = remote.question_encoder(**inputs())[0].detach()
        docs = retriever(inputs()["input_ids"], hidden.numpy(), return_tensors="pt")
        scores = torch.bmm(hidden.unsqueeze(1), docs["retrieved_doc_embeds"].float().transpose(1, 2))
        given = {
            "context_input_ids": docs["context_input_ids"],
            "context_attention_mask": docs["context_attention_mask"],
            "doc_scores": scores.squeeze(1),
        }
        if made is RemoteRagSequenceForGeneration:
            model.rag.retriever = None
    ours, theirs = remote.generate(**given, **arguments), model.generate(**given, **arguments)
    assert ours.dtype == theirs.dtype == torch.int64
    assert ours.shape[0] == theirs.shape[0] == (6 if how == "contexts" else 2)
    assert trimmed(ours) == trimmed(theirs)
    remote.close()


def test_generation_config_and_what_cannot_cross(pair: TinyPair) -> None:
    from transformers import GenerationConfig

    with_service = RemoteRagTokenForGeneration(pair.generator.grpc, SERVICE)
    config = GenerationConfig(num_beams=2, max_length=8, eos_token_id=2)
    by_config = with_service.generate(**inputs(), generation_config=config)
    assert torch.equal(by_config, with_service.generate(**inputs(), num_beams=2, max_length=8))
    with pytest.raises(ValueError, match="allowed_sequences"):
        with_service.generate(**inputs(), prefix_allowed_tokens_fn=lambda _batch, _ids: [3])
    with pytest.raises(TypeError, match="penalty_alpha"):
        with_service.generate(**inputs(), penalty_alpha=0.6)
    torch.manual_seed(5)
    first = with_service.generate(**inputs(), do_sample=True, max_length=8)
    torch.manual_seed(5)
    assert torch.equal(first, with_service.generate(**inputs(), do_sample=True, max_length=8))
    with_service.close()


def test_past_key_values_continue_and_are_released(pair: TinyPair, retriever: RagRetriever) -> None:
    remote = RemoteRagTokenForGeneration(pair.generator.grpc, retriever)
    *docs, _ = remote._retrieved(inputs()["input_ids"], inputs()["attention_mask"], N_DOCS)
    given = dict(zip(("context_input_ids", "context_attention_mask", "doc_scores"), docs, strict=True))
    whole = remote(**given, decoder_input_ids=LABELS)
    assert whole.past_key_values is None
    first = remote(**given, decoder_input_ids=LABELS[:, :3], use_cache=True)
    assert first.past_key_values.get_seq_length() == 3
    encoder_outputs = (first.generator_enc_last_hidden_state,)
    rest = remote(
        encoder_outputs=encoder_outputs,
        context_attention_mask=given["context_attention_mask"],
        doc_scores=given["doc_scores"],
        past_key_values=first.past_key_values,
        decoder_input_ids=LABELS[:, 3:],
    )
    parts = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(parts, whole.logits, atol=1e-4, rtol=1e-5)
    first.past_key_values.release()
    with pytest.raises(NotFoundError, match="released"):
        remote(past_key_values=first.past_key_values, decoder_input_ids=LABELS[:, 3:])
    remote.close()


def test_backward_says_that_gradients_do_not_cross_the_wire(pair: TinyPair) -> None:
    remote = RemoteRagSequenceForGeneration(pair.generator.grpc, SERVICE)
    loss = remote(**inputs(), labels=LABELS, reduce_loss=True).loss
    with pytest.raises(RemoteGradientError, match="gradients do not cross the wire"):
        loss.backward()
    with torch.no_grad():
        assert not remote(**inputs(), labels=LABELS).loss.requires_grad
    with pytest.raises(RemoteGradientError):
        remote.train()
    remote.close()


def test_missing_inputs_are_named(pair: TinyPair) -> None:
    remote = RemoteRagTokenForGeneration(pair.generator.grpc)
    with pytest.raises(ValueError, match="context_input_ids"):
        remote(**inputs(), labels=LABELS)
    with pytest.raises(ValueError, match="doc_scores"):
        remote(context_input_ids=LABELS, context_attention_mask=LABELS, labels=LABELS)
    remote.close()


def test_remote_index_says_where_there_are_too_few_documents(pair: TinyPair) -> None:
    index = RemoteIndex(pair.retriever.grpc)
    with pytest.raises(ValueError, match="the index found 9"):
        index.get_top_docs(np.zeros((1, 16), np.float32), 20)
    dicts = index.get_doc_dicts(np.array([[0, 3], [3, 1]]))
    assert dicts[0]["text"][1] == dicts[1]["text"][0]
    index.close()


def test_rag_client_needs_no_torch() -> None:
    """Only rag_client.hf imports it."""
    import subprocess
    import sys

    code = "import sys, rag_client; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
