"""The part of rag.retriever.v1 that changes the corpus and the index."""

import functools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from rag.retriever.v1 import document_pb2, retriever_service_pb2, retriever_service_pb2_grpc
from rag_serving.errors import RagError
from rag_serving.interceptors.base import Context
from retriever_service import corpus_wire
from retriever_service.context.assembler import ContextAssembler
from retriever_service.corpus.base import Upsert
from retriever_service.corpus_wire import ChangeLimits
from retriever_service.errors import ExpectationError
from retriever_service.generations import Description, Generations
from retriever_service.index.manifest import Manifest
from retriever_service.maintenance import Maintenance
from retriever_service.operations import Operation
from retriever_service.types import Metric

METRICS = {
    Metric.INNER_PRODUCT: document_pb2.METRIC_INNER_PRODUCT,
    Metric.L2: document_pb2.METRIC_L2,
}
# Seconds for which a caller's expectation forbids to activate an index that does not meet it. Generators ask
# for the index far more often.
_EXPECTATION_S = 60.0
_MAX_EXPECTATIONS = 64


@dataclass(frozen=True, slots=True)
class IndexDefaults:
    """What GetIndex says beside the index: how requests are answered that do not say."""

    default_n_docs: int
    max_n_docs: int
    max_combined_length: int


class Expectations:
    """What those who call expect of the index; remembered a minute, so that no activation fails them."""

    def __init__(self) -> None:
        self._seen: dict[bytes, float] = {}

    def remember(self, expectation: document_pb2.Expectation) -> None:
        """Notes what a caller expects, and that the index meets it."""
        content = expectation.SerializeToString(deterministic=True)
        if content:
            self._seen.pop(content, None)
            self._seen[content] = time.monotonic()
            while len(self._seen) > _MAX_EXPECTATIONS:
                del self._seen[next(iter(self._seen))]

    def recent(self) -> list[document_pb2.Expectation]:
        """Returns what was expected in the last minute."""
        since_s = time.monotonic() - _EXPECTATION_S
        return [
            document_pb2.Expectation.FromString(content)
            for content, seen_s in self._seen.items()
            if seen_s >= since_s
        ]


class CorpusServicer(retriever_service_pb2_grpc.RetrieverServiceServicer):
    """Changes, listing, compaction, activation; what it raises becomes a status in the error interceptor."""

    def __init__(
        self,
        generations: Generations,
        maintenance: Maintenance,
        assembler: ContextAssembler,
        index_defaults: IndexDefaults,
        change_limits: ChangeLimits,
    ) -> None:
        self._generations = generations
        self._maintenance = maintenance
        self._assembler = assembler
        self._index_defaults = index_defaults
        self._change_limits = change_limits
        self._expectations = Expectations()

    async def UpsertDocuments(  # noqa: N802  (the contract's name)
        self,
        request_iterator: AsyncIterator[retriever_service_pb2.UpsertDocumentsRequest],
        _context: Context,
    ) -> AsyncIterator[retriever_service_pb2.UpsertDocumentsResponse]:
        """Writes batches in the order they come; the first that fails ends the stream."""
        async for request in request_iterator:
            documents = corpus_wire.read_documents(request, self._change_limits)
            manifest = self._generations.current.generation.manifest
            embeddings = corpus_wire.read_embeddings(request, manifest.dimension, manifest.embedding)
            if embeddings is None:
                passages = [(document.title, document.text) for document in documents]
                embeddings = await self._maintenance.embed(passages, manifest.embedding)
            batch = Upsert(
                request.request_id,
                corpus_wire.digest_of(request),
                documents,
                embeddings,
                request.create_only,
                manifest.embedding,
            )
            written = await self._maintenance.upsert(batch)
            yield retriever_service_pb2.UpsertDocumentsResponse(
                request_id=request.request_id,
                rows=written.rows,
                etags=written.etags,
                created=written.created,
                replaced=written.replaced,
                sequence=written.sequence,
            )

    async def DeleteDocuments(  # noqa: N802
        self, request: retriever_service_pb2.DeleteDocumentsRequest, _context: Context
    ) -> retriever_service_pb2.DeleteDocumentsResponse:
        """Deletes documents by key."""
        deleted = await self._maintenance.delete(corpus_wire.read_delete(request, self._change_limits))
        return retriever_service_pb2.DeleteDocumentsResponse(
            request_id=request.request_id,
            deleted=deleted.deleted,
            missing_keys=deleted.missing_keys,
            sequence=deleted.sequence,
        )

    async def ListDocuments(  # noqa: N802
        self, request: retriever_service_pb2.ListDocumentsRequest, _context: Context
    ) -> retriever_service_pb2.ListDocumentsResponse:
        """Reads a page of documents, in the order of keys."""
        after_key, size = corpus_wire.read_page(request, self._change_limits)
        page, total_size = await self._maintenance.page(after_key, size)
        return corpus_wire.page_response(page, total_size, self._change_limits)

    async def CompactIndex(  # noqa: N802
        self, _request: retriever_service_pb2.CompactIndexRequest, _context: Context
    ) -> retriever_service_pb2.CompactIndexResponse:
        """Begins a compaction."""
        operation = self._operation(self._maintenance.compact())
        return retriever_service_pb2.CompactIndexResponse(operation=operation)

    async def ActivateIndex(  # noqa: N802
        self, request: retriever_service_pb2.ActivateIndexRequest, _context: Context
    ) -> retriever_service_pb2.ActivateIndexResponse:
        """Begins to load another index folder."""
        expected = [request.expectation]
        if not request.ignore_callers:
            expected += self._expectations.recent()
        check = functools.partial(self._check_all, expected, request.ignore_callers)
        operation = self._operation(self._maintenance.activate(request.index_folder, check))
        return retriever_service_pb2.ActivateIndexResponse(operation=operation)

    async def GetOperation(  # noqa: N802
        self, request: retriever_service_pb2.GetOperationRequest, _context: Context
    ) -> retriever_service_pb2.GetOperationResponse:
        """Says how far an operation is."""
        operation = self._operation(self._maintenance.operations.get(request.name))
        return retriever_service_pb2.GetOperationResponse(operation=operation)

    async def ListOperations(  # noqa: N802
        self, _request: retriever_service_pb2.ListOperationsRequest, _context: Context
    ) -> retriever_service_pb2.ListOperationsResponse:
        """Lists the operations of this process."""
        operations = [self._operation(one) for one in self._maintenance.operations.newest_first()]
        return retriever_service_pb2.ListOperationsResponse(operations=operations)

    async def CancelOperation(  # noqa: N802
        self, request: retriever_service_pb2.CancelOperationRequest, _context: Context
    ) -> retriever_service_pb2.CancelOperationResponse:
        """Asks an operation to stop."""
        operation = self._operation(self._maintenance.operations.cancel(request.name))
        return retriever_service_pb2.CancelOperationResponse(operation=operation)

    def check_expectation(self, expectation: document_pb2.Expectation, manifest: Manifest) -> None:
        """Raises ExpectationError where the caller was built for another index; what is not set fits."""
        embedding = manifest.embedding
        if expectation.embedding_model and not embedding.matches(expectation.embedding_model):
            raise ExpectationError("embedding_model", expectation.embedding_model, embedding.name)
        metric = METRICS[manifest.metric]
        if expectation.metric not in {document_pb2.METRIC_UNSPECIFIED, metric}:
            raise ExpectationError("metric", _metric_name(expectation.metric), _metric_name(metric))
        digest = self._assembler.tokenizer.digest
        if expectation.context_tokenizer_digest and expectation.context_tokenizer_digest != digest:
            raise ExpectationError("context_tokenizer_digest", expectation.context_tokenizer_digest, digest)
        if expectation.dimension and expectation.dimension != manifest.dimension:
            raise ExpectationError("dimension", expectation.dimension, manifest.dimension)

    def describe(self, index: Description) -> retriever_service_pb2.GetIndexResponse:
        """Describes a generation, and how contexts are assembled here."""
        manifest, assembler = index.manifest, self._assembler
        return retriever_service_pb2.GetIndexResponse(
            ntotal=index.ntotal,
            dimension=manifest.dimension,
            metric=METRICS[manifest.metric],
            kind=manifest.kind,
            generation=index.number,
            embedding_model=manifest.embedding.name,
            context_tokenizer_digest=assembler.tokenizer.digest,
            max_combined_length=self._index_defaults.max_combined_length,
            default_n_docs=self._index_defaults.default_n_docs,
            max_n_docs=self._index_defaults.max_n_docs,
            title_sep=assembler.title_sep,
            doc_sep=assembler.doc_sep,
            prefix=assembler.prefix,
            sequence=index.sequence,
            pending_changes=index.pending_changes,
            writable=index.writable,
            generations=index.serving,
            index_folder=str(index.index_folder),
            devices=index.devices,
        )

    def _check_all(
        self, expectations: list[document_pb2.Expectation], ignore_callers: bool, manifest: Manifest
    ) -> None:
        """Checks what was expected when an activation was asked for, and by those who have called since."""
        later = [] if ignore_callers else self._expectations.recent()
        for expectation in (*expectations, *later):
            self.check_expectation(expectation, manifest)

    def _operation(self, operation: Operation[Description]) -> retriever_service_pb2.Operation:
        response = retriever_service_pb2.Operation(
            name=operation.name,
            stage=operation.stage,
            done_documents=operation.done_documents,
            total_documents=operation.total_documents,
            create_time=corpus_wire.timestamp(operation.create_time_s),
            done=operation.done,
        )
        if operation.error is not None:
            response.error.CopyFrom(_error(operation.error))
        elif operation.result is not None:
            response.response.CopyFrom(self.describe(operation.result))
        return response


def _error(error: RagError) -> retriever_service_pb2.OperationError:
    code: int = grpc.StatusCode[error.status].value[0]
    return retriever_service_pb2.OperationError(code=code, message=error.message, reason=error.reason)


def _metric_name(metric: int) -> str:
    """Also of a number that has no name."""
    value = document_pb2.Metric.DESCRIPTOR.values_by_number.get(metric)
    return str(metric) if value is None else str(value.name)
