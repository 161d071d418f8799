"""rag.retriever.v1 on the wire: protobuf <-> domain, nothing else; what is wrong is refused by its name."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving import tensor_codec
from rag_serving.errors import InvalidArgumentError
from rag_serving.interceptors.base import Context
from retriever_service.context.assembler import ContextAssembler
from retriever_service.corpus_servicer import CorpusServicer, IndexDefaults
from retriever_service.corpus_wire import ChangeLimits, document, documents_within
from retriever_service.filter_wire import read_filter
from retriever_service.generations import Generations
from retriever_service.maintenance import Maintenance
from retriever_service.types import (
    MAX_NORM,
    Float32Array,
    Int64Array,
    Query,
    Retrieved,
    SearchParameters,
    Truncation,
)

SERVICE_NAME: str = retriever_service_pb2.DESCRIPTOR.services_by_name["RetrieverService"].full_name

_TRUNCATIONS: dict[int, Truncation] = {
    document_pb2.TRUNCATION_UNSPECIFIED: Truncation.KEEP_QUESTION,
    document_pb2.TRUNCATION_KEEP_QUESTION: Truncation.KEEP_QUESTION,
    document_pb2.TRUNCATION_QUESTION_LAST: Truncation.QUESTION_LAST,
}
_NO_DOCUMENT = document_pb2.Document(row=-1)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask for, and what it gets where it does not say; `dimension` is the index's."""

    dimension: int
    default_n_docs: int
    max_n_docs: int
    max_batch: int
    max_contexts: int
    max_question_chars: int
    max_get_documents: int
    max_candidates: int
    max_combined_length: int
    min_combined_length: int
    num_question_tokens: int | None


class RetrieverServicer(CorpusServicer):
    """Serves the generations. What it raises becomes a status in the error interceptor."""

    def __init__(
        self,
        generations: Generations,
        maintenance: Maintenance,
        assembler: ContextAssembler,
        limits: RequestLimits,
        change_limits: ChangeLimits | None = None,
    ) -> None:
        defaults = IndexDefaults(limits.default_n_docs, limits.max_n_docs, limits.max_combined_length)
        super().__init__(generations, maintenance, assembler, defaults, change_limits or ChangeLimits())
        self._limits = limits

    async def Retrieve(  # noqa: N802  (the contract's name)
        self, request: retriever_service_pb2.RetrieveRequest, _context: Context
    ) -> retriever_service_pb2.RetrieveResponse:
        """Finds n_docs documents for each question and assembles the generator's input."""
        with self._generations.lease(request.generation) as served:
            manifest = served.generation.manifest
            self.check_expectation(request.expectation, manifest)
            self._expectations.remember(request.expectation)
            limits = self._limits
            if limits.dimension != manifest.dimension:  # another index was activated
                limits = replace(limits, dimension=manifest.dimension)
            query = _read_query(request, limits)
            retrieved = await served.retriever.retrieve(query)
            return _response(retrieved, request, self._change_limits.max_message_bytes)

    async def GetDocuments(  # noqa: N802
        self, request: retriever_service_pb2.GetDocumentsRequest, _context: Context
    ) -> retriever_service_pb2.GetDocumentsResponse:
        """Reads documents by key or by row."""
        _check_get_documents(request, self._limits)
        with self._generations.lease() as served:
            by_key, by_row = await served.retriever.documents(list(request.keys), list(request.rows))
        asked = [by_key.get(key) for key in request.keys] + [by_row.get(row) for row in request.rows]
        found = [one for one in asked if one is not None]
        response = retriever_service_pb2.GetDocumentsResponse(
            missing_keys=[key for key in request.keys if key not in by_key],
            missing_rows=[row for row in request.rows if row not in by_row],
        )
        max_bytes = self._change_limits.max_message_bytes
        response.documents.extend(documents_within(map(document, found), max_bytes - response.ByteSize()))
        if len(response.documents) < len(found):
            raise InvalidArgumentError(
                "keys" if request.keys else "rows",
                f"{len(found)} documents are more than an answer of {max_bytes} bytes holds:"
                f" ask for {len(response.documents)}, which fit, and then for the others",
            )
        return response

    async def GetIndex(  # noqa: N802
        self, request: retriever_service_pb2.GetIndexRequest, _context: Context
    ) -> retriever_service_pb2.GetIndexResponse:
        """Describes the index that answers now."""
        served = self._generations.current
        self.check_expectation(request.expectation, served.generation.manifest)
        self._expectations.remember(request.expectation)
        return self.describe(self._generations.describe(served))


def _response(
    retrieved: Retrieved, request: retriever_service_pb2.RetrieveRequest, max_bytes: int
) -> retriever_service_pb2.RetrieveResponse:
    batch, n_docs = retrieved.rows.shape
    response = retriever_service_pb2.RetrieveResponse(
        doc_scores=tensor_codec.encode(retrieved.doc_scores),
        retrieved_doc_ids=tensor_codec.encode(retrieved.rows),
        n_docs_found=retrieved.n_docs_found,
        n_docs=n_docs,
        generation=retrieved.generation,
    )
    if retrieved.contexts is not None:
        response.context_input_ids.CopyFrom(tensor_codec.encode(retrieved.contexts.input_ids))
        response.context_attention_mask.CopyFrom(tensor_codec.encode(retrieved.contexts.attention_mask))
        question_cut = retrieved.contexts.question_cut.reshape(batch, n_docs)
        response.question_truncated.extend(bool(cut.any()) for cut in question_cut)
    if request.include_retrieved_doc_embeds:
        response.retrieved_doc_embeds.CopyFrom(tensor_codec.encode(retrieved.doc_embeds))
    if request.include_documents:
        response.documents.extend(documents_within(_documents(retrieved), max_bytes - response.ByteSize()))
        if len(response.documents) < retrieved.rows.size:
            raise InvalidArgumentError(
                "include_documents",
                f"the documents are more than an answer of {max_bytes} bytes holds: read them by GetDocuments",
            )
    return response


def _documents(retrieved: Retrieved) -> Iterable[document_pb2.Document]:
    for found in retrieved.documents:
        for one in found:
            yield _NO_DOCUMENT if one is None else document(one)


def _read_query(request: retriever_service_pb2.RetrieveRequest, limits: RequestLimits) -> Query:
    """Returns the query of a request. Raises InvalidArgumentError naming the first wrong field."""
    vectors = _question_hidden_states(request, limits)
    batch = len(vectors)
    n_docs = _n_docs(request, batch, limits)
    if request.truncation not in _TRUNCATIONS:
        raise InvalidArgumentError("truncation", "unknown value", int(request.truncation))
    texts, input_ids = _questions(request, batch, limits)
    return Query(
        question_hidden_states=vectors,
        n_docs=n_docs,
        max_combined_length=_max_combined_length(request, limits),
        question_texts=texts,
        question_input_ids=input_ids,
        prefix=_prefix(request, limits),
        search_parameters=_search_parameters(request),
        truncation=_TRUNCATIONS[request.truncation],
        skip_contexts=request.skip_contexts,
        filter=read_filter(request.filter) if request.HasField("filter") else None,
        score_threshold=_score_threshold(request),
        rescore_factor=_rescore_factor(request, batch * n_docs, limits),
    )


def _check_get_documents(request: retriever_service_pb2.GetDocumentsRequest, limits: RequestLimits) -> None:
    """Raises InvalidArgumentError where nothing, or too much, is asked for."""
    asked = len(request.keys) + len(request.rows)
    field = "keys" if request.keys or not request.rows else "rows"
    if asked == 0:
        raise InvalidArgumentError(field, "give keys or rows")
    if asked > limits.max_get_documents:
        raise InvalidArgumentError(field, f"at most {limits.max_get_documents} keys and rows together", asked)


def _question_hidden_states(
    request: retriever_service_pb2.RetrieveRequest, limits: RequestLimits
) -> Float32Array:
    field = "question_hidden_states"
    if not request.HasField("question_hidden_states"):
        raise InvalidArgumentError(field, "is required")
    vectors: Float32Array = tensor_codec.decode(
        request.question_hidden_states, field, dtypes=tensor_codec.FLOATS, ndim=2, finite=True, widen=True
    )
    if len(vectors) == 0:
        raise InvalidArgumentError(field, "an empty batch")
    if len(vectors) > limits.max_batch:
        raise InvalidArgumentError(field, f"at most {limits.max_batch} questions", len(vectors))
    if vectors.shape[1] != limits.dimension:
        raise InvalidArgumentError(
            field, f"the index has dimension {limits.dimension}, the questions have {vectors.shape[1]}"
        )
    longest = float(np.linalg.norm(vectors.astype(np.float64), axis=1).max())
    if longest > MAX_NORM:
        raise InvalidArgumentError(field, f"a vector's length must be at most {MAX_NORM:g}", longest)
    return vectors


def _n_docs(request: retriever_service_pb2.RetrieveRequest, batch: int, limits: RequestLimits) -> int:
    if request.n_docs < 0:
        raise InvalidArgumentError("n_docs", "must not be negative", request.n_docs)
    if request.n_docs > limits.max_n_docs:
        raise InvalidArgumentError("n_docs", f"must be at most {limits.max_n_docs}", request.n_docs)
    n_docs = request.n_docs or limits.default_n_docs
    if batch * n_docs > limits.max_contexts:
        raise InvalidArgumentError(
            "n_docs",
            f"{batch} questions times {n_docs} documents are more than {limits.max_contexts} contexts",
        )
    return n_docs


def _questions(
    request: retriever_service_pb2.RetrieveRequest, batch: int, limits: RequestLimits
) -> tuple[list[str] | None, Int64Array | None]:
    given = request.WhichOneof("question")
    if given == "question_texts":
        return _texts(list(request.question_texts.texts), batch, limits), None
    if given == "question_input_ids":
        return None, _input_ids(request, batch, limits)
    if not request.skip_contexts:
        raise InvalidArgumentError(
            "question", "give question_texts or question_input_ids, or set skip_contexts"
        )
    return None, None


def _texts(texts: list[str], batch: int, limits: RequestLimits) -> list[str]:
    field = "question_texts.texts"
    if len(texts) != batch:
        raise InvalidArgumentError(field, f"{len(texts)} texts for {batch} rows of question_hidden_states")
    for position, text in enumerate(texts):
        if len(text) > limits.max_question_chars:
            raise InvalidArgumentError(
                f"{field}[{position}]", f"at most {limits.max_question_chars} characters", len(text)
            )
    return texts


def _input_ids(
    request: retriever_service_pb2.RetrieveRequest, batch: int, limits: RequestLimits
) -> Int64Array:
    field = "question_input_ids"
    ids: Int64Array = tensor_codec.decode(
        request.question_input_ids, field, dtypes=tensor_codec.INTEGERS, ndim=2, widen=True
    )
    if len(ids) != batch:
        raise InvalidArgumentError(field, f"{len(ids)} rows for {batch} rows of question_hidden_states")
    if ids.shape[1] > limits.max_question_chars:
        raise InvalidArgumentError(field, f"at most {limits.max_question_chars} ids a question", ids.shape[1])
    num_tokens = limits.num_question_tokens
    outside = ids[(ids < 0) | (ids >= (num_tokens if num_tokens is not None else np.iinfo(np.int64).max))]
    if outside.size:
        known = "" if num_tokens is None else f" of {num_tokens} tokens"
        raise InvalidArgumentError(field, f"outside the vocabulary{known}", int(outside[0]))
    return ids


def _max_combined_length(request: retriever_service_pb2.RetrieveRequest, limits: RequestLimits) -> int:
    asked = request.max_combined_length
    if asked == 0:
        return limits.max_combined_length
    if asked < limits.min_combined_length:
        raise InvalidArgumentError(
            "max_combined_length", f"must be at least {limits.min_combined_length}", asked
        )
    return int(asked)


def _prefix(request: retriever_service_pb2.RetrieveRequest, limits: RequestLimits) -> str | None:
    if not request.HasField("prefix"):
        return None
    if len(request.prefix) > limits.max_question_chars:
        raise InvalidArgumentError(
            "prefix", f"at most {limits.max_question_chars} characters", len(request.prefix)
        )
    return request.prefix


def _search_parameters(request: retriever_service_pb2.RetrieveRequest) -> SearchParameters:
    asked = request.search_parameters
    for knob in ("nprobe", "ef_search"):
        value = getattr(asked, knob)
        if value < 0:
            raise InvalidArgumentError(f"search_parameters.{knob}", "must not be negative", value)
    return SearchParameters(nprobe=asked.nprobe, ef_search=asked.ef_search)


def _rescore_factor(
    request: retriever_service_pb2.RetrieveRequest, contexts: int, limits: RequestLimits
) -> int:
    field, factor = "search_parameters.rescore_factor", request.search_parameters.rescore_factor
    if factor < 0:
        raise InvalidArgumentError(field, "must not be negative", factor)
    if factor > 1 and factor * contexts > limits.max_candidates:
        raise InvalidArgumentError(
            field,
            f"{contexts} contexts times {factor} are more than {limits.max_candidates} candidates",
        )
    return max(1, int(factor))


def _score_threshold(request: retriever_service_pb2.RetrieveRequest) -> float | None:
    if not request.HasField("score_threshold"):
        return None
    if not np.isfinite(request.score_threshold):
        raise InvalidArgumentError("score_threshold", "must be finite", request.score_threshold)
    return float(request.score_threshold)
