"""The calls Forward and ReleasePastKeyValues: what a request asks for, and its answer in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from generator_service import forward_wire, wire
from generator_service.checkpoint import Checkpoint
from generator_service.engine.pass_messages import Array, ForwardPass
from generator_service.forward import Forwarder, Given, QuestionBatch, as_array
from generator_service.request_checks import RequestLimits
from generator_service.types import ModelClass
from rag.generator.v1 import forward_pb2
from rag_serving.errors import FailedPreconditionError, InvalidArgumentError

_Flag = Literal["exclude_bos_score", "reduce_loss", "do_marginalize"]


class ForwardCalls:
    """Serves one Forwarder. What it raises becomes a status in the error interceptor."""

    def __init__(
        self,
        forwarder: Forwarder,
        checkpoint: Checkpoint,
        limits: RequestLimits,
        *,
        past_expires_s: float,
    ) -> None:
        self._forwarder, self._checkpoint, self._limits = forwarder, checkpoint, limits
        self._past_expires_s = past_expires_s
        self._default_n_docs = min(checkpoint.n_docs, limits.max_n_docs)

    async def forward(
        self, request: forward_pb2.ForwardRequest
    ) -> AsyncIterator[forward_pb2.ForwardResponse]:
        """The header and the pieces of one pass."""
        given = self._read_input(request)
        work = self._read_pass(request, given)
        result = await self._forwarder.forward(given, work)
        header = forward_pb2.ForwardHeader(
            model_class=forward_wire.WIRE_MODEL_CLASSES[work.model_class],
            checkpoint_digest=self._checkpoint.digest,
            past_key_values_expires_s=self._past_expires_s if result.past_key_values else 0.0,
        )
        for part in forward_wire.write_parts(result, header):
            yield part

    async def release(
        self, request: forward_pb2.ReleasePastKeyValuesRequest
    ) -> forward_pb2.ReleasePastKeyValuesResponse:
        """Free a handle."""
        if not request.past_key_values:
            raise InvalidArgumentError("past_key_values", "must not be empty", "")
        await self._forwarder.release(request.past_key_values)
        return forward_pb2.ReleasePastKeyValuesResponse()

    def _read_input(self, request: forward_pb2.ForwardRequest) -> Given:
        which = request.WhichOneof("input")
        if which == "contexts":
            return forward_wire.read_contexts(request.contexts, self._limits)
        if which == "encoder_outputs":
            return forward_wire.read_encoder_outputs(request.encoder_outputs, self._limits)
        if which is None:
            if request.past_key_values:
                return None
            raise InvalidArgumentError("input", "one of its fields must be set, or past_key_values")
        return self._read_questions(request, which)

    def _read_questions(self, request: forward_pb2.ForwardRequest, which: str) -> QuestionBatch:
        tokenizer = self._checkpoint.question_tokenizer
        if self._limits.question_max_length == 0 or tokenizer is None:
            raise FailedPreconditionError(
                "this generator has no question encoder: send contexts", reason="NO_ENCODER"
            )
        retrieval = replace(
            wire.read_retrieval(request.retrieval_config, self._default_n_docs, self._limits),
            include_embeds="retrieved_doc_embeds" in forward_wire.read_outputs(request),
        )
        if which == "question_tokens":
            ids, mask = forward_wire.read_question_tokens(request.question_tokens, self._limits)
            return QuestionBatch(ids, mask, None, retrieval)
        questions = wire.read_question_texts(request.question_texts.texts, tokenizer, self._limits)
        width = max(len(row) for row in questions.input_ids)
        ids = np.full((len(questions.input_ids), width), tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(questions.input_ids):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return QuestionBatch(ids, mask, questions.texts, retrieval)

    def _read_pass(self, request: forward_pb2.ForwardRequest, given: Given) -> ForwardPass:
        checkpoint = self._checkpoint
        model_class = wire.read_enum(forward_wire.MODEL_CLASSES, request.model_class, "model_class")
        epsilon = checkpoint.label_smoothing
        if request.HasField("label_smoothing"):
            epsilon = request.label_smoothing
        if not 0 <= epsilon < 1:
            raise InvalidArgumentError("label_smoothing", "must be at least 0 and below 1", epsilon)
        batch = None
        if given is not None:
            batch = len(given.input_ids if isinstance(given, QuestionBatch) else given.doc_scores)
        targets = forward_wire.read_targets(request, batch, self._limits)

        def flag(name: _Flag) -> bool:
            return bool(getattr(request if request.HasField(name) else checkpoint, name))

        return ForwardPass(
            request_id=0,
            outputs=forward_wire.read_outputs(request),
            model_class=model_class or ModelClass(checkpoint.default_strategy.value),
            context_input_ids=None,
            encoder_last_hidden_state=None,
            context_attention_mask=None,
            doc_scores=None,
            decoder_input_ids=_optional(targets["decoder_input_ids"]),
            decoder_attention_mask=_optional(targets["decoder_attention_mask"]),
            labels=_optional(targets["labels"]),
            exclude_bos_score=flag("exclude_bos_score"),
            reduce_loss=flag("reduce_loss"),
            label_smoothing=epsilon,
            do_marginalize=flag("do_marginalize"),
            bos_token_id=checkpoint.bos_token_id,
            use_cache=request.use_cache and not request.HasField("labels"),
            past_key_values=request.past_key_values,
        )


def _optional(array: npt.NDArray[np.int64] | None) -> Array | None:
    return None if array is None else as_array(array)
