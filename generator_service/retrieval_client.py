"""The only caller of the retriever: question hidden states out, contexts and doc_scores in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from generator_service.errors import MismatchError, RetrieverUnavailableError
from rag.filter.v1 import filter_pb2
from rag.retriever.v1 import document_pb2, retriever_service_pb2, retriever_service_pb2_grpc
from rag_serving import tensor_codec
from rag_serving.channel import RetryPolicy, open_channel
from rag_serving.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidArgumentError,
    RagError,
    ResourceExhaustedError,
)
from rag_serving.request_deadline import time_left_s
from rag_serving.rich_status import from_rpc_error

_METRICS = {
    "any": document_pb2.METRIC_UNSPECIFIED,
    "inner_product": document_pb2.METRIC_INNER_PRODUCT,
    "l2": document_pb2.METRIC_L2,
}
RETRIEVER_SERVICE = "rag.retriever.v1.RetrieverService"
_CHECK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RetrievalSettings:
    """How documents are retrieved; 0 and None leave it to the retriever."""

    n_docs: int
    prefix: str | None = None
    nprobe: int = 0
    ef_search: int = 0
    max_combined_length: int = 0
    truncate_question_last: bool = False
    include_embeds: bool = False
    rescore_factor: int = 0
    filter: filter_pb2.Filter | None = None  # passed on as it came: the retriever checks it
    score_threshold: float | None = None


@dataclass(frozen=True)
class FoundDocument:
    """A retrieved document."""

    key: str
    row: int
    title: str
    text: str


@dataclass(frozen=True)
class RetrievedQuestion:
    """One question's contexts, with no pads; doc_scores are exact inner products, best first."""

    contexts: list[list[int]]
    doc_scores: list[float]
    documents: list[FoundDocument]


@dataclass(frozen=True)
class Retrieval:
    """The retriever's answer to a batch. padded_length is max_combined_length, to which Hugging Face pads."""

    questions: list[RetrievedQuestion]
    generation: int
    padded_length: int
    retrieved_doc_embeds: npt.NDArray[np.float32] | None = None  # [batch, n_docs, dim], where asked for


@dataclass(frozen=True)
class Expected:
    """What this generator was built for; empty strings and 0 accept anything, and so does the metric "any"."""

    embedding_model: str
    context_tokenizer_digest: str
    dimension: int
    metric: str


class RetrievalClient:
    """A channel to the retriever; make it inside the running event loop, close it."""

    def __init__(self, address: str, expected: Expected, *, max_message_bytes: int) -> None:
        self.address = address
        self._expected = expected
        self._max_combined_length = 0
        methods = [f"{RETRIEVER_SERVICE}/{name}" for name in ("Retrieve", "GetDocuments", "GetIndex")]
        self._channel = open_channel(
            address, max_message_bytes=max_message_bytes, retry=RetryPolicy(methods=methods)
        )
        self._stub = retriever_service_pb2_grpc.RetrieverServiceStub(self._channel)  # type: ignore[no-untyped-call,unused-ignore]

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def check_fit(self) -> None:
        """Have the retriever compare its index with what this generator was built for, as it does in each Retrieve.

        Raises MismatchError naming both values, RetrieverUnavailableError where nobody answers.
        """
        request = retriever_service_pb2.GetIndexRequest(expectation=self._expectation())
        try:
            index = await self._stub.GetIndex(request, timeout=_CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        self._max_combined_length = index.max_combined_length

    async def retrieve(
        self,
        question_hidden_states: npt.NDArray[np.float32],
        *,
        texts: Sequence[str] | None,
        input_ids: npt.NDArray[np.int64] | None,
        settings: RetrievalSettings,
    ) -> Retrieval:
        """Documents of a batch: question_hidden_states float32 [batch, dim], the questions as text or token ids.

        Raises what the retriever says, with its field names, and RetrieverUnavailableError where it is not there.
        """
        request = retriever_service_pb2.RetrieveRequest(
            question_hidden_states=tensor_codec.encode(question_hidden_states),
            n_docs=settings.n_docs,
            prefix=settings.prefix,
            search_parameters=document_pb2.SearchParameters(
                nprobe=settings.nprobe,
                ef_search=settings.ef_search,
                rescore_factor=settings.rescore_factor,
            ),
            filter=settings.filter,
            score_threshold=settings.score_threshold,
            max_combined_length=settings.max_combined_length,
            truncation=document_pb2.TRUNCATION_QUESTION_LAST
            if settings.truncate_question_last
            else document_pb2.TRUNCATION_KEEP_QUESTION,
            include_documents=True,
            include_retrieved_doc_embeds=settings.include_embeds,
            expectation=self._expectation(),
        )
        if texts is not None:
            request.question_texts.texts.extend(texts)
        else:
            assert input_ids is not None
            request.question_input_ids.CopyFrom(tensor_codec.encode(input_ids))
        try:
            response = await self._stub.Retrieve(request, timeout=time_left_s())
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        padded_length = settings.max_combined_length or self._max_combined_length
        embeds = None
        if settings.include_embeds:
            embeds = tensor_codec.decode(response.retrieved_doc_embeds, "retrieved_doc_embeds", ndim=3)
        return Retrieval(_questions(response), response.generation, padded_length, embeds)

    def _expectation(self) -> document_pb2.Expectation:
        expected = self._expected
        return document_pb2.Expectation(
            embedding_model=expected.embedding_model,
            context_tokenizer_digest=expected.context_tokenizer_digest,
            dimension=expected.dimension,
            metric=_METRICS[expected.metric],
        )

    def _translated(self, error: grpc.aio.AioRpcError) -> RagError:
        details = error.details() or error.code().name
        match error.code():
            case grpc.StatusCode.INVALID_ARGUMENT:
                return _as_retrieval_config(from_rpc_error(error))
            case grpc.StatusCode.FAILED_PRECONDITION:
                return MismatchError(f"the retriever at {self.address} does not fit: {details}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return ResourceExhaustedError(f"the retriever is overloaded: {details}", 1.0)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceededError(f"the retriever at {self.address} did not answer in time")
            case _:
                return RetrieverUnavailableError(
                    f"the retriever at {self.address} is not available: {details}", 1.0
                )


def _as_retrieval_config(error: RagError) -> RagError:
    """The retriever's refusal, in the names of the request that its fields came from."""
    if not isinstance(error, InvalidArgumentError):
        return error
    return InvalidArgumentError.of(
        [
            FieldViolation(
                f"retrieval_config.{violation.field.removeprefix('search_parameters.')}",
                f"the retriever refuses it: {violation.description}",
            )
            for violation in error.violations
        ]
    )


def _questions(response: retriever_service_pb2.RetrieveResponse) -> list[RetrievedQuestion]:
    ids = tensor_codec.decode(response.context_input_ids, "context_input_ids", ndim=2)
    lengths = tensor_codec.decode(response.context_attention_mask, "context_attention_mask", ndim=2).sum(
        axis=1
    )
    scores = tensor_codec.decode(response.doc_scores, "doc_scores", ndim=2)
    questions = []
    for index, found in enumerate(response.n_docs_found):
        first = index * response.n_docs
        rows = range(first, first + found)
        questions.append(
            RetrievedQuestion(
                contexts=[ids[row, : lengths[row]].tolist() for row in rows],
                doc_scores=scores[index, :found].tolist(),
                documents=[
                    FoundDocument(d.key, d.row, d.title, d.text)
                    for d in response.documents[first : first + found]
                ],
            )
        )
    return questions
