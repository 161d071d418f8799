"""Forward passes end to end: encode the questions, retrieve, run the generator, with every output kept."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from generator_service.engine.async_engine import AsyncEngine
from generator_service.engine.pass_messages import Array, ForwardPass, NamedArray, QuestionPass
from generator_service.errors import MismatchError, NoDocumentsError, PastLostError
from generator_service.retrieval_client import Retrieval, RetrievalClient, RetrievalSettings
from rag_serving.request_deadline import time_left_s

_HANDLE = re.compile(r"(\d{1,4})\.(.+)", re.ASCII | re.DOTALL)
_QUESTION_OUTPUTS = (
    "question_encoder_last_hidden_state",
    "question_enc_hidden_states",
    "question_enc_attentions",
)
_TYPES = {"float32": "<f4", "int64": "<i8"}


@dataclass(frozen=True)
class QuestionBatch:
    """int64 [batch, length] twice; no mask leaves it to the encoder. texts stand in the contexts where given."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64] | None
    texts: list[str] | None
    retrieval: RetrievalSettings


@dataclass(frozen=True)
class ContextBatch:
    """int64 [batch * n_docs, length] twice, float32 [batch, n_docs], as Hugging Face's forward takes them."""

    context_input_ids: npt.NDArray[np.int64]
    context_attention_mask: npt.NDArray[np.int64]
    doc_scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncodedBatch:
    """float32 [batch * n_docs, length, d_model], int64 [batch * n_docs, length], float32 [batch, n_docs]."""

    last_hidden_state: npt.NDArray[np.float32]
    context_attention_mask: npt.NDArray[np.int64] | None
    doc_scores: npt.NDArray[np.float32]


Given = QuestionBatch | ContextBatch | EncodedBatch | None


@dataclass
class ForwardResult:
    """Outputs by name, the handle that use_cache left, and what was used."""

    arrays: list[NamedArray] = field(default_factory=list)
    past_key_values: str = ""
    n_docs: int = 0
    generation: int = 0


class Forwarder:
    """Runs the stages; knows neither protobuf nor gRPC."""

    def __init__(
        self, engine: AsyncEngine, retrieval: RetrievalClient | None, *, context_pad_token_id: int
    ) -> None:
        self._engine, self._retrieval = engine, retrieval
        self._context_pad = context_pad_token_id

    async def forward(self, given: Given, work: ForwardPass) -> ForwardResult:
        """One pass; work says what is wanted, and its tensors of the contexts are filled in from what is given.

        Raises RagError's subclasses, PastLostError where work's handle is no longer held.
        """
        worker, inner = self._located(work.past_key_values) if work.past_key_values else (None, "")
        result = ForwardResult()
        left_s = time_left_s()
        work = msgspec.structs.replace(
            work, past_key_values=inner, deadline_s=None if left_s is None else time.monotonic() + left_s
        )
        with self._engine.accepted(_count(given)):
            if isinstance(given, QuestionBatch):
                given = await self._retrieved(given, work, result)
            done, where = await self._engine.run_pass(_filled(work, given), worker)
        result.arrays += done.arrays
        result.n_docs = done.n_docs
        if done.past_key_values:
            result.past_key_values = f"{where}.{done.past_key_values}"
        return result

    async def release(self, past_key_values: str) -> None:
        """Free a handle. Raises PastLostError where it is not held."""
        worker, inner = self._located(past_key_values)
        await self._engine.release_past(inner, worker)

    async def _retrieved(
        self, questions: QuestionBatch, work: ForwardPass, result: ForwardResult
    ) -> ContextBatch:
        if self._retrieval is None:
            raise MismatchError("this generator has no retriever: send contexts, or set retriever_address")
        mask = questions.attention_mask
        encoded, _ = await self._engine.run_pass(
            QuestionPass(
                request_id=0,
                outputs=[name for name in _QUESTION_OUTPUTS if name in work.outputs],
                input_ids=as_array(questions.input_ids),
                attention_mask=None if mask is None else as_array(mask),
                priority=work.priority,
                deadline_s=work.deadline_s,
            )
        )
        vectors = np.frombuffer(encoded.arrays[0].array.data, "<f4").reshape(encoded.arrays[0].array.shape)
        result.arrays += [one for one in encoded.arrays if one.name in work.outputs]
        retrieval = await self._retrieval.retrieve(
            vectors.astype(np.float32),
            texts=questions.texts,
            input_ids=None if questions.texts is not None else questions.input_ids,
            settings=questions.retrieval,
        )
        result.generation = retrieval.generation
        contexts, rows = self._padded(retrieval)
        found: dict[str, npt.NDArray[np.generic]] = {
            "context_input_ids": contexts.context_input_ids,
            "context_attention_mask": contexts.context_attention_mask,
            "retrieved_doc_ids": rows,
        }
        if retrieval.retrieved_doc_embeds is not None:
            found["retrieved_doc_embeds"] = retrieval.retrieved_doc_embeds
        result.arrays += [
            NamedArray(name=name, layer=None, array=as_array(array))
            for name, array in found.items()
            if name in work.outputs
        ]
        return contexts

    def _padded(self, retrieval: Retrieval) -> tuple[ContextBatch, npt.NDArray[np.int64]]:
        """Contexts padded to max_combined_length, and the documents' rows.

        A document that is not there has row -1, a score of -inf, and one pad for a context, which nobody then sees.
        """
        found = retrieval.questions
        n_docs = max(len(q.contexts) for q in found)
        for index, question in enumerate(found):
            if not question.contexts:
                raise NoDocumentsError(f"the index gave no document for question {index}")
        width = max(retrieval.padded_length, *(len(c) for q in found for c in q.contexts))
        ids = np.full((len(found), n_docs, width), self._context_pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        mask[:, :, 0] = 1
        scores = np.full((len(found), n_docs), -np.inf, dtype=np.float32)
        rows = np.full((len(found), n_docs), -1, dtype=np.int64)
        for index, question in enumerate(found):
            for place, context in enumerate(question.contexts):
                ids[index, place, : len(context)], mask[index, place, : len(context)] = context, 1
                scores[index, place] = question.doc_scores[place]
                rows[index, place] = question.documents[place].row
        return ContextBatch(ids.reshape(-1, width), mask.reshape(-1, width), scores), rows

    def _located(self, past_key_values: str) -> tuple[int, str]:
        """A handle's worker, and the handle as that worker knows it."""
        parts = _HANDLE.fullmatch(past_key_values)
        if parts is None or int(parts[1]) >= len(self._engine.workers):
            raise PastLostError(f"past_key_values {past_key_values[:80]!r} is no handle of this service")
        return int(parts[1]), parts[2]


def as_array(array: npt.NDArray[np.generic]) -> Array:
    """For a worker: float32 or int64."""
    dtype = _TYPES[array.dtype.name]
    data = np.ascontiguousarray(array.astype(dtype, copy=False)).tobytes()
    return Array(dtype=dtype, shape=list(array.shape), data=data)


def _count(given: Given) -> int:
    match given:
        case QuestionBatch():
            return len(given.input_ids)
        case ContextBatch() | EncodedBatch():
            return len(given.doc_scores)
        case None:
            return 1


def _filled(work: ForwardPass, given: ContextBatch | EncodedBatch | None) -> ForwardPass:
    if given is None:
        return work
    mask = given.context_attention_mask
    common = {
        "context_attention_mask": None if mask is None else as_array(mask),
        "doc_scores": as_array(given.doc_scores),
    }
    if isinstance(given, ContextBatch):
        return msgspec.structs.replace(work, context_input_ids=as_array(given.context_input_ids), **common)
    return msgspec.structs.replace(
        work, encoder_last_hidden_state=as_array(given.last_hidden_state), **common
    )
