"""Requests pinned to what answers them: a checkpoint, an index generation and contexts, settings and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from generator_service import wire
from generator_service.answerer import GenerationOptions, QuestionContexts
from generator_service.errors import PinnedElsewhereError
from generator_service.types import GenerationSettings
from rag.generator.v1 import generation_pb2, generator_service_pb2

_OFF = -1


def check_checkpoint(request: generator_service_pb2.GenerateRequest, digest: str) -> None:
    """Raises PinnedElsewhereError where the request wants another checkpoint."""
    if request.expected_checkpoint_digest not in {"", digest}:
        raise PinnedElsewhereError("expected_checkpoint_digest", request.expected_checkpoint_digest, digest)


def check_contexts(
    request: generator_service_pb2.GenerateRequest, generation: int, contexts: Sequence[QuestionContexts]
) -> None:
    """Raises PinnedElsewhereError where the index generation (0 with the caller's contexts) or the contexts differ."""
    if request.expected_index_generation not in {0, generation}:
        raise PinnedElsewhereError("expected_index_generation", request.expected_index_generation, generation)
    if request.expected_contexts_digest:
        here = contexts_digest(contexts)
        if request.expected_contexts_digest != here:
            raise PinnedElsewhereError("expected_contexts_digest", request.expected_contexts_digest, here)


def contexts_digest(questions: Sequence[QuestionContexts]) -> str:
    """sha256 of all token ids: each question's and each context's begin with their number."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(np.array([len(question.contexts)], dtype="<i8").tobytes())
        for context in question.contexts:
            digest.update(np.array([len(context), *context], dtype="<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"


def pinned(
    request: generator_service_pb2.GenerateRequest,
    options: GenerationOptions,
    contexts: Sequence[QuestionContexts],
    *,
    checkpoint_digest: str,
    index_generation: int,
    default_n_docs: int,
) -> generator_service_pb2.GenerateRequest:
    """The request without its input, with everything that was left open as it was decided."""
    whole = generator_service_pb2.GenerateRequest()
    whole.CopyFrom(request)
    for name in ("question_texts", "question_tokens", "contexts"):
        whole.ClearField(name)
    if request.WhichOneof("input") == "contexts":
        whole.ClearField("retrieval_config")
    else:
        whole.retrieval_config.n_docs = request.retrieval_config.n_docs or default_n_docs
    whole.generation_config.CopyFrom(_whole_config(options.settings))
    whole.strategy = wire.WIRE_STRATEGIES[options.strategy]
    whole.sequence_decoding = wire.WIRE_SEQUENCE_DECODINGS[options.sequence_decoding]
    whole.compatibility = wire.WIRE_COMPATIBILITIES[options.compatibility]
    whole.do_deduplication = options.do_deduplication
    whole.exclude_bos_score = options.exclude_bos_score
    whole.expected_checkpoint_digest = checkpoint_digest
    whole.expected_index_generation = index_generation
    whole.expected_contexts_digest = contexts_digest(contexts)
    return whole


def _whole_config(settings: GenerationSettings) -> generation_pb2.GenerationConfig:
    """Resolved settings as arguments that resolve to them again, whatever the checkpoint says of those left out."""
    config = wire.write_generation_config(settings)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if getattr(settings, name) is None:
            setattr(config, name, _OFF)
    for sequence in settings.allowed_sequences:
        config.allowed_sequences.add(token_ids=sequence)
    if settings.do_sample:
        config.seed = settings.seed
    return config
