"""Runs forward passes on the device: everything that Hugging Face's forward returns, and the caches it leaves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generator_service.decoding import forward_outputs
from generator_service.engine.pass_messages import (
    Array,
    ForwardPass,
    NamedArray,
    Pass,
    PassDone,
    QuestionPass,
    ReleasePast,
)
from generator_service.engine.past_store import Past, PastError, PastStore
from generator_service.model.forward_modules import (
    GeneratorInputs,
    GeneratorModule,
    PassShape,
    QuestionModule,
)
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.types import ModelClass

logger = logging.getLogger(__name__)

_ATTENTIONS = {"generator_enc_attentions", "generator_dec_attentions", "generator_cross_attentions"}
_HIDDEN_STATES = {"generator_enc_hidden_states", "generator_dec_hidden_states"}
_OF_TRANSFORMERS = {
    "generator_enc_last_hidden_state": "encoder_last_hidden_state",
    "generator_enc_hidden_states": "encoder_hidden_states",
    "generator_enc_attentions": "encoder_attentions",
    "generator_dec_hidden_states": "decoder_hidden_states",
    "generator_dec_attentions": "decoder_attentions",
    "generator_cross_attentions": "cross_attentions",
}


class PassRefusedError(Exception):
    """A pass that cannot be run: status, the field that is wrong, and why."""

    def __init__(self, status: str, field: str, message: str) -> None:
        super().__init__(message)
        self.status, self.field, self.message = status, field, message


class PassRunner:
    """Checks a pass before it is queued, and runs it as one part of a step."""

    def __init__(
        self,
        generator: GeneratorModule,
        question_encoder: QuestionEncoder | None,
        store: PastStore,
        *,
        max_output_bytes: int,
    ) -> None:
        self._generator, self._encoder, self._store = generator, question_encoder, store
        self._question = None if question_encoder is None else QuestionModule(question_encoder.module)
        self._max_output_bytes = max_output_bytes

    def required_bytes(self, work: Pass) -> int:
        """What the device must have free for it. Raises PassRefusedError where it may not run at all."""
        if isinstance(work, QuestionPass):
            assert self._question is not None, "the service refuses questions where there is no encoder"
            batch, length = work.input_ids.shape
            outputs = sum(self._question.output_bytes(name, batch, length) for name in work.outputs)
            self._check_outputs(outputs)
            return 2 * outputs + self._question.working_bytes(batch, length)
        shape = self._shape(work, self._past(work))
        outputs = sum(self._generator.output_bytes(name, shape) for name in work.outputs)
        self._check_outputs(outputs)
        held = self._generator.past_bytes(shape) if work.use_cache else 0
        return 2 * outputs + held + self._generator.working_bytes(shape)

    def run(self, work: Pass) -> PassDone:
        """Run it. Raises PassRefusedError where a handle is lost, there is no room for one more, or the module fails.

        Memory that runs out is the step's affair and goes up as it is.
        """
        try:
            return self._run_question(work) if isinstance(work, QuestionPass) else self._run_generator(work)
        except (PassRefusedError, torch.OutOfMemoryError, MemoryError):
            raise
        except (ValueError, IndexError, TypeError) as error:
            logger.exception("transformers refuses a pass")
            raise PassRefusedError("INVALID_ARGUMENT", "input", f"the model refuses it: {error}") from error

    def release(self, work: ReleasePast) -> PassDone:
        """Free a handle. Raises PassRefusedError where it is lost."""
        try:
            self._store.release(work.past_key_values)
        except PastError as error:
            raise PassRefusedError(error.status, "past_key_values", error.message) from error
        return PassDone(request_id=work.request_id, arrays=[])

    def expire(self) -> None:
        """Free the handles whose time is over."""
        self._store.expire()

    # --- the question encoder

    def _run_question(self, work: QuestionPass) -> PassDone:
        assert self._question is not None
        assert self._encoder is not None
        ids, given = self._tensor(work.input_ids), self._optional(work.attention_mask)
        outputs = self._question.run(
            ids,
            given,
            attentions="question_enc_attentions" in work.outputs,
            hidden_states="question_enc_hidden_states" in work.outputs,
        )
        mask = torch.ones_like(ids) if given is None else given
        arrays = [_named("question_encoder_last_hidden_state", self._encoder.vectors(outputs, mask))]
        for name in ("question_enc_hidden_states", "question_enc_attentions"):
            if name in work.outputs:
                arrays += _layers(name, getattr(outputs, name.removeprefix("question_enc_")))
        return PassDone(request_id=work.request_id, arrays=arrays)

    # --- the generator

    def _run_generator(self, work: ForwardPass) -> PassDone:
        past = self._past(work)
        if work.use_cache:
            self._check_room(self._generator.past_bytes(self._shape(work, past)))
        hidden = self._optional(work.encoder_last_hidden_state)
        mask, scores = self._optional(work.context_attention_mask), self._optional(work.doc_scores)
        if past is not None:
            if hidden is None and work.context_input_ids is None:
                hidden = past.encoder_last_hidden_state
                mask = past.context_attention_mask
            scores = past.doc_scores if scores is None else scores
        assert scores is not None, "the service sends doc_scores with everything but a handle"
        inputs = self._inputs(work, hidden, mask, past, n_docs=scores.shape[1])
        outputs = self._generator.run(
            inputs,
            attentions=not _ATTENTIONS.isdisjoint(work.outputs),
            hidden_states=not _HIDDEN_STATES.isdisjoint(work.outputs),
            use_cache=work.use_cache,
        )
        handle = ""
        if work.use_cache:
            kept = Past(outputs.past_key_values, outputs.encoder_last_hidden_state, mask, scores)
            handle = self._store.add(kept)
        return PassDone(
            request_id=work.request_id,
            arrays=self._arrays(work, outputs, scores),
            past_key_values=handle,
            n_docs=scores.shape[1],
        )

    def _inputs(
        self, work: ForwardPass, hidden: Tensor | None, mask: Tensor | None, past: Past | None, *, n_docs: int
    ) -> GeneratorInputs:
        decoder_ids = self._optional(work.decoder_input_ids or work.labels)
        decoder_mask = self._optional(work.decoder_attention_mask)
        return GeneratorInputs(
            context_input_ids=self._optional(work.context_input_ids),
            encoder_last_hidden_state=hidden,
            context_attention_mask=mask,
            decoder_input_ids=None if decoder_ids is None else decoder_ids.repeat_interleave(n_docs, dim=0),
            decoder_attention_mask=None
            if decoder_mask is None
            else decoder_mask.repeat_interleave(n_docs, dim=0),
            cache=None if past is None else past.copied_cache(),
        )

    def _arrays(self, work: ForwardPass, outputs: Any, doc_scores: Tensor) -> list[NamedArray]:
        arrays = []
        for name in work.outputs:
            if name == "logits":
                arrays.append(_named(name, self._logits(work, outputs.logits, doc_scores)))
            elif name == "doc_scores":
                arrays.append(_named(name, doc_scores))
            elif name == "loss" and work.labels is not None and work.model_class is not ModelClass.RAG_MODEL:
                arrays.append(_named(name, self._loss(work, outputs.logits, doc_scores)))
            elif name == "generator_enc_last_hidden_state":
                arrays.append(_named(name, outputs.encoder_last_hidden_state))
            elif name in _OF_TRANSFORMERS:
                # None where the encoder did not run, as in transformers
                arrays += _layers(name, getattr(outputs, _OF_TRANSFORMERS[name]) or ())
        return arrays

    @staticmethod
    def _logits(work: ForwardPass, logits: Tensor, doc_scores: Tensor) -> Tensor:
        if work.model_class is ModelClass.RAG_TOKEN and work.do_marginalize:
            return forward_outputs.marginalized(logits, doc_scores)
        return logits

    def _loss(self, work: ForwardPass, logits: Tensor, doc_scores: Tensor) -> Tensor:
        assert work.labels is not None
        if work.model_class is ModelClass.RAG_TOKEN:
            return forward_outputs.token_loss(
                logits,
                doc_scores,
                self._tensor(work.labels),
                pad_token_id=self._generator.pad_token_id,
                epsilon=work.label_smoothing,
                reduce=work.reduce_loss,
            )
        # RagSequenceForGeneration scores decoder_input_ids where they are given beside labels
        return forward_outputs.sequence_loss(
            logits,
            doc_scores,
            self._tensor(work.decoder_input_ids or work.labels),
            pad_token_id=self._generator.pad_token_id,
            epsilon=work.label_smoothing,
            reduce=work.reduce_loss,
            excluded_bos=work.bos_token_id if work.exclude_bos_score else None,
        )

    # --- checks

    def _shape(self, work: ForwardPass, past: Past | None) -> PassShape:
        given = work.context_input_ids or work.encoder_last_hidden_state
        target = work.decoder_input_ids or work.labels
        rows = source = 0
        if past is not None:
            rows, source = past.encoder_last_hidden_state.shape[:2]
        if given is not None:
            if past is not None and [rows, source] != given.shape[:2]:
                raise PassRefusedError(
                    "INVALID_ARGUMENT",
                    "past_key_values",
                    f"holds {rows} contexts of {source} tokens, and {given.shape[:2]} are given",
                )
            rows, source = given.shape[:2]
        if past is not None:
            self._check_past(work, past)
        hidden = work.encoder_last_hidden_state
        if hidden is not None and hidden.shape[2] != self._generator.d_model:
            raise PassRefusedError(
                "INVALID_ARGUMENT",
                "encoder_outputs.last_hidden_state",
                f"must have the generator's width {self._generator.d_model}, has {hidden.shape[2]}",
            )
        if target is None:
            if work.context_input_ids is None or not self._generator.makes_decoder_input_ids:
                raise PassRefusedError(
                    "INVALID_ARGUMENT",
                    "decoder_input_ids",
                    "must be set here, or labels: nothing else gives them",
                )
            return PassShape(rows, source, source)
        shape = PassShape(rows, source, target.shape[1], 0 if past is None else past.length)
        longest = self._generator.max_positions
        if longest is not None and shape.past + shape.target > longest:
            raise PassRefusedError(
                "INVALID_ARGUMENT",
                "decoder_input_ids",
                f"{shape.past} tokens are held and {shape.target} more are sent, of {longest} positions",
            )
        return shape

    @staticmethod
    def _check_past(work: ForwardPass, past: Past) -> None:
        batch, n_docs = past.doc_scores.shape
        for name in ("doc_scores", "decoder_input_ids", "labels"):
            array: Array | None = getattr(work, name)
            if array is not None and array.shape[0] != batch:
                raise PassRefusedError(
                    "INVALID_ARGUMENT",
                    name,
                    f"must have a row for each of the {batch} questions of past_key_values, has {array.shape[0]}",
                )
        if work.doc_scores is not None and work.doc_scores.shape[1] != n_docs:
            raise PassRefusedError(
                "INVALID_ARGUMENT", "doc_scores", f"past_key_values has {n_docs} documents for each question"
            )
        target = work.decoder_input_ids or work.labels
        mask = work.decoder_attention_mask
        if target is not None and mask is not None and mask.shape[1] != past.length + target.shape[1]:
            raise PassRefusedError(
                "INVALID_ARGUMENT",
                "decoder_attention_mask",
                f"must have {past.length} columns for past_key_values and {target.shape[1]} more, has {mask.shape[1]}",
            )

    def _past(self, work: ForwardPass) -> Past | None:
        if not work.past_key_values:
            return None
        try:
            return self._store.get(work.past_key_values)
        except PastError as error:
            raise PassRefusedError(error.status, "past_key_values", error.message) from error

    def _check_room(self, num_bytes: int) -> None:
        try:
            self._store.check_room(num_bytes)
        except PastError as error:
            raise PassRefusedError(error.status, "use_cache", error.message) from error

    def _check_outputs(self, num_bytes: int) -> None:
        if num_bytes > self._max_output_bytes:
            raise PassRefusedError(
                "INVALID_ARGUMENT",
                "output_mask",
                f"the outputs have {num_bytes} bytes, and a forward pass may return {self._max_output_bytes}: choose"
                " fewer of them, or send fewer questions, documents or tokens",
            )

    def _tensor(self, array: Array) -> Tensor:
        data = np.frombuffer(bytearray(array.data), dtype=array.dtype).reshape(array.shape)
        return torch.from_numpy(data).to(self._generator.device)

    def _optional(self, array: Array | None) -> Tensor | None:
        return None if array is None else self._tensor(array)


def _named(name: str, tensor: Tensor, layer: int | None = None) -> NamedArray:
    host = tensor.detach().float().cpu().contiguous().numpy()
    data = host.astype("<f4", copy=False).tobytes()
    return NamedArray(name=name, layer=layer, array=Array(dtype="<f4", shape=list(host.shape), data=data))


def _layers(name: str, tensors: Sequence[Tensor]) -> list[NamedArray]:
    return [_named(name, tensor, layer) for layer, tensor in enumerate(tensors)]
