"""Every output of a forward pass against transformers' three classes, tensor by tensor."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RagModel

from generator_service.engine.pass_messages import ForwardPass, PassDone, QuestionPass
from generator_service.engine.pass_runner import PassRefusedError, PassRunner
from generator_service.engine.past_store import PastStore
from generator_service.forward import as_array
from generator_service.model.forward_modules import GeneratorModule
from generator_service.model.loader import as_backbone
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.types import ModelClass, Pooling
from tests.parity import cases
from tests.parity.oracle import Batch
from tests.parity.test_score import random_labels
from tests.parity.tiny_models import TinyRag, tiny_generator, tiny_rag

FAMILIES = ["bart", "t5", "t5-gated", "pegasus"]
LAYERED = {
    "generator_enc_hidden_states",
    "generator_enc_attentions",
    "generator_dec_hidden_states",
    "generator_dec_attentions",
    "generator_cross_attentions",
}
OUTPUTS = ["loss", "logits", "doc_scores", "generator_enc_last_hidden_state", *sorted(LAYERED)]


def new_passes(rag: TinyRag, **limits: Any) -> PassRunner:
    store = PastStore(**({"max_handles": 8, "max_bytes": 1 << 24, "expires_s": 60.0} | limits))
    encoder = QuestionEncoder(
        rag.question_encoder, pooling=Pooling.FIRST_OUTPUT, normalize=False, score_scale=1.0
    )
    return PassRunner(GeneratorModule(rag.generator), encoder, store, max_output_bytes=1 << 26)


def forward_pass(batch: Batch | None, model_class: ModelClass, **fields: Any) -> ForwardPass:
    """A pass over a batch's contexts; tensors of any integer or float type."""
    given = {} if batch is None else batch.tensors()
    tensors = {
        name: fields.pop(name, None) if name in fields else given.get(name)
        for name in (
            "context_input_ids",
            "encoder_last_hidden_state",
            "context_attention_mask",
            "doc_scores",
            "decoder_input_ids",
            "decoder_attention_mask",
            "labels",
        )
    }
    plain: dict[str, Any] = {
        "outputs": OUTPUTS,
        "exclude_bos_score": False,
        "reduce_loss": False,
        "label_smoothing": 0.0,
        "do_marginalize": False,
        "bos_token_id": None,
        "use_cache": False,
        "past_key_values": "",
    }
    arrays = {
        name: None if t is None else as_array(t.numpy() if t.is_floating_point() else t.long().numpy())
        for name, t in tensors.items()
    }
    return ForwardPass(request_id=0, model_class=model_class, **arrays, **(plain | fields))


@torch.inference_mode()
def run(passes: PassRunner, work: ForwardPass | QuestionPass) -> PassDone:
    passes.required_bytes(work)
    return passes.run(work)


def tensors(done: PassDone) -> dict[str, Any]:
    """By name; layers as tuples."""
    found: dict[str, Any] = {}
    for one in done.arrays:
        array = np.frombuffer(one.array.data, one.array.dtype).reshape(one.array.shape).copy()
        if one.layer is None:
            found[one.name] = torch.from_numpy(array)
        else:
            found[one.name] = (*found.get(one.name, ()), torch.from_numpy(array))
    return found


@contextmanager
def all_shown(model: Any) -> Iterator[None]:
    """transformers' RAG drops output_hidden_states, and fused attention shows none: configs bring them out."""
    parts = [*model.generator.modules(), *model.question_encoder.modules()]
    configs = list({id(part.config): part.config for part in parts if hasattr(part, "config")}.values())
    before = [(c.output_hidden_states, c._attn_implementation) for c in configs]
    for config in configs:
        config.output_hidden_states = True
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, (hidden, attention) in zip(configs, before, strict=True):
            config.output_hidden_states, config._attn_implementation = hidden, attention


def expected(model: Any, **arguments: Any) -> Any:
    rag = model if isinstance(model, RagModel) else model.rag
    with torch.no_grad(), all_shown(rag):
        return model(output_attentions=True, **arguments)


def model_of(rag: TinyRag, model_class: ModelClass) -> Any:
    match model_class:
        case ModelClass.RAG_TOKEN:
            return rag.token
        case ModelClass.RAG_SEQUENCE:
            return rag.sequence
        case ModelClass.RAG_MODEL:
            return rag.token.rag


def assert_same(ours: dict[str, Any], theirs: Any, names: list[str]) -> None:
    for name in names:
        other = getattr(theirs, name, None)
        if other is None:
            assert name not in ours, name
        elif name in LAYERED:
            assert len(ours[name]) == len(other), name
            for mine, one in zip(ours[name], other, strict=True):
                torch.testing.assert_close(mine, one, atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            torch.testing.assert_close(
                ours[name], other, atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def targets_of(rag: TinyRag, seed: int, size: int) -> Tensor:
    rng = random.Random(seed)
    return torch.tensor(random_labels(rag, rng, size, bos=[True] * size))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_docs", [1, 2, 5])
@pytest.mark.parametrize("model_class", list(ModelClass))
def test_every_output_is_that_of_hugging_face(family: str, n_docs: int, model_class: ModelClass) -> None:
    rag = tiny_rag(family, n_docs % 3)
    batch = cases.random_batch(rag, 300 + n_docs, n_docs=n_docs, size=2)
    labels = targets_of(rag, n_docs, 2)
    loss = {} if model_class is ModelClass.RAG_MODEL else {"labels": labels, "reduce_loss": False}
    arguments = {"decoder_input_ids": labels} if model_class is ModelClass.RAG_MODEL else loss
    theirs = expected(model_of(rag, model_class), **batch.tensors(), n_docs=n_docs, **arguments)
    ours = run(new_passes(rag), forward_pass(batch, model_class, **arguments))
    assert ours.n_docs == n_docs
    assert_same(tensors(ours), theirs, OUTPUTS)


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("reduce_loss", [False, True])
def test_losses_and_marginalised_logits_are_those_of_hugging_face(
    family: str, epsilon: float, reduce_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rag = tiny_rag(family, 1)
    batch = cases.random_batch(rag, 77, n_docs=3, size=3)
    labels = targets_of(rag, 4, 3)
    for model, model_class, own in (
        (rag.token, ModelClass.RAG_TOKEN, {"do_marginalize": True}),
        (rag.sequence, ModelClass.RAG_SEQUENCE, {"exclude_bos_score": True}),
    ):
        monkeypatch.setattr(model.config, "label_smoothing", epsilon)
        common = {"labels": labels, "reduce_loss": reduce_loss, **own}
        theirs = expected(model, **batch.tensors(), n_docs=3, **common)
        work = forward_pass(
            batch, model_class, label_smoothing=epsilon, bos_token_id=rag.bos_token_id, **common
        )
        assert_same(tensors(run(new_passes(rag), work)), theirs, ["loss", "logits", "doc_scores"])


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_outputs_stand_for_contexts(family: str) -> None:
    rag = tiny_rag(family, 2)
    batch = cases.random_batch(rag, 5, n_docs=2, size=2)
    labels, given = targets_of(rag, 5, 2), batch.tensors()
    passes = new_passes(rag)
    whole = tensors(run(passes, forward_pass(batch, ModelClass.RAG_TOKEN, labels=labels)))
    hidden = whole["generator_enc_last_hidden_state"]
    work = forward_pass(
        batch,
        ModelClass.RAG_TOKEN,
        labels=labels,
        context_input_ids=None,
        encoder_last_hidden_state=hidden,
    )
    given.pop("context_input_ids")
    theirs = expected(rag.token, **given, encoder_outputs=(hidden,), labels=labels, n_docs=2)
    ours = tensors(run(passes, work))
    assert_same(ours, theirs, ["loss", "logits", "generator_cross_attentions", "generator_dec_hidden_states"])
    torch.testing.assert_close(ours["logits"], whole["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_decoder_attention_mask_hides_what_it_says(family: str) -> None:
    rag = tiny_rag(family, 0)
    batch = cases.random_batch(rag, 6, n_docs=2, size=2)
    ids = targets_of(rag, 6, 2)
    mask = torch.ones_like(ids)
    mask[:, 1] = 0
    arguments = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    theirs = expected(rag.token, **batch.tensors(), n_docs=2, **arguments)
    ours = tensors(run(new_passes(rag), forward_pass(batch, ModelClass.RAG_TOKEN, **arguments)))
    assert_same(ours, theirs, ["logits", "generator_dec_attentions"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_continues_from_past_key_values(family: str) -> None:
    """In two parts and from one handle twice: a handle stays as it is."""
    rag = tiny_rag(family, 1)
    batch = cases.random_batch(rag, 8, n_docs=3, size=2)
    ids = targets_of(rag, 8, 2)
    theirs = expected(rag.token, **batch.tensors(), n_docs=3, decoder_input_ids=ids)
    passes = new_passes(rag)
    first = run(
        passes,
        forward_pass(batch, ModelClass.RAG_TOKEN, decoder_input_ids=ids[:, :2], use_cache=True),
    )
    for _ in range(2):
        middle = run(
            passes,
            forward_pass(
                None,
                ModelClass.RAG_TOKEN,
                decoder_input_ids=ids[:, 2:3],
                use_cache=True,
                past_key_values=first.past_key_values,
            ),
        )
    assert middle.past_key_values != first.past_key_values
    last = forward_pass(
        batch,  # given again, as Hugging Face's callers do
        ModelClass.RAG_TOKEN,
        decoder_input_ids=ids[:, 3:],
        past_key_values=middle.past_key_values,
    )
    parts = [tensors(one)["logits"] for one in (first, middle, run(passes, last))]
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs.logits, atol=1e-4, rtol=1e-5)


def test_past_key_values_are_bounded_released_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 9, n_docs=2, size=1)
    work = forward_pass(
        batch, ModelClass.RAG_TOKEN, decoder_input_ids=targets_of(rag, 9, 1)[:, :2], use_cache=True
    )
    store = PastStore(max_handles=2, max_bytes=1 << 20, expires_s=10.0)
    passes = new_passes(rag)
    passes._store = store
    first, second = run(passes, work).past_key_values, run(passes, work).past_key_values
    assert store.num_bytes > 0
    with pytest.raises(PassRefusedError, match="2 of 1048576 bytes are allowed") as refused:
        run(passes, work)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    store.release(first)
    with pytest.raises(PassRefusedError, match="it was released") as lost:
        run(
            passes,
            forward_pass(
                None, ModelClass.RAG_TOKEN, decoder_input_ids=torch.tensor([[5]]), past_key_values=first
            ),
        )
    assert lost.value.status == "NOT_FOUND"
    now = time.monotonic()
    monkeypatch.setattr("generator_service.engine.past_store.time.monotonic", lambda: now + 11)
    with pytest.raises(PassRefusedError, match="it expired after 10 s without use"):
        run(
            passes,
            forward_pass(
                None, ModelClass.RAG_TOKEN, decoder_input_ids=torch.tensor([[5]]), past_key_values=second
            ),
        )
    assert len(store) == 0
    assert store.num_bytes == 0


def test_past_bytes_are_known_beforehand() -> None:
    for family in ("bart", "t5-gated"):
        rag = tiny_rag(family, 0)
        batch = cases.random_batch(rag, 10, n_docs=3, size=2)
        passes = new_passes(rag)
        work = forward_pass(
            batch, ModelClass.RAG_TOKEN, decoder_input_ids=targets_of(rag, 10, 2)[:, :3], use_cache=True
        )
        run(passes, work)
        predicted = passes._generator.past_bytes(passes._shape(work, None))
        small = sum(t.numel() * t.element_size() for t in batch.tensors().values())
        assert predicted <= passes._store.num_bytes <= predicted + small


def test_too_many_bytes_are_refused_with_their_number() -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 11, n_docs=2, size=1)
    passes = new_passes(rag)
    passes._max_output_bytes = 100
    with pytest.raises(PassRefusedError, match="may return 100") as refused:
        run(passes, forward_pass(batch, ModelClass.RAG_TOKEN, labels=targets_of(rag, 1, 1)))
    assert refused.value.field == "output_mask"


def test_bart_decodes_its_input_where_nothing_else_is_given_and_t5_is_refused() -> None:
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 12, n_docs=2, size=2)
    theirs = expected(rag.token.rag, **batch.tensors(), n_docs=2)
    assert_same(tensors(run(new_passes(rag), forward_pass(batch, ModelClass.RAG_MODEL))), theirs, OUTPUTS)
    t5 = tiny_rag("t5", 0)
    with pytest.raises(PassRefusedError, match="must be set here") as refused:
        run(new_passes(t5), forward_pass(batch, ModelClass.RAG_MODEL))
    assert refused.value.field == "decoder_input_ids"


@pytest.mark.parametrize("masked", [True, False])
def test_question_encoder_shows_its_states(masked: bool) -> None:
    rag = tiny_rag("bart", 0)
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) if masked else None
    with torch.no_grad(), all_shown(rag.token.rag):
        theirs = rag.question_encoder(
            ids, attention_mask=mask, output_attentions=True, output_hidden_states=True
        )
    work = QuestionPass(
        request_id=0,
        outputs=["question_enc_hidden_states", "question_enc_attentions"],
        input_ids=as_array(ids.numpy()),
        attention_mask=None if mask is None else as_array(mask.numpy()),
    )
    ours = tensors(run(new_passes(rag), work))
    torch.testing.assert_close(ours["question_encoder_last_hidden_state"], theirs[0], atol=1e-4, rtol=1e-5)
    for name in ("hidden_states", "attentions"):
        mine, other = ours[f"question_enc_{name}"], getattr(theirs, name)
        assert len(mine) == len(other) > 0
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)


def test_hugging_face_drops_output_hidden_states() -> None:
    """Ours are returned on request: docs/parity.md."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 13, n_docs=2, size=1)
    with torch.no_grad():
        theirs = rag.token(
            **batch.tensors(), n_docs=2, decoder_input_ids=torch.tensor([[2, 5]]), output_hidden_states=True
        )
    assert theirs.generator_dec_hidden_states is None


@pytest.mark.parametrize("family", ["bart", "t5-gated"])
def test_transformers_modules_and_the_backbone_hold_one_copy_of_the_weights(family: str) -> None:
    """A GPU would otherwise need room for the generator twice; the CPU's float32 layers are laid out anew."""
    generator = tiny_generator(family, 0).to(torch.bfloat16)
    backbone = as_backbone(generator)
    held = {p.untyped_storage().data_ptr() for p in backbone.parameters()}  # type: ignore[attr-defined]
    own = [p for name, p in generator.named_parameters() if "q_proj" in name or "SelfAttention.q" in name]
    assert own
    assert all(p.untyped_storage().data_ptr() in held for p in own)
