"""The client for asyncio: one method a call of the contract, plain data in and out."""

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rag.generator.v1 import forward_pb2, generator_service_pb2, generator_service_pb2_grpc
from rag.retriever.v1 import retriever_service_pb2, retriever_service_pb2_grpc
from rag_client import corpus, messages
from rag_client.corpus import Deleted, DocumentPage, Upserted
from rag_client.errors import from_rpc_error
from rag_client.forward import ForwardAssembly, ForwardInput, forward_request
from rag_client.messages import Input, Questions, Targets
from rag_client.operation import Operation, operation_of, wait_for
from rag_client.options import (
    ForwardOptions,
    GenerateOptions,
    RetrieveOptions,
    ScoreOptions,
    StreamOptions,
)
from rag_client.types import (
    AnswerPiece,
    Contexts,
    CorpusDocument,
    DocumentLookup,
    Explanations,
    FloatArray,
    ForwardOutputs,
    Generation,
    Health,
    IndexInfo,
    ModelInfo,
    Retrieval,
    Scores,
)
from rag_serving.channel import RetryPolicy, open_channel

GENERATOR_SERVICE = "rag.generator.v1.GeneratorService"
RETRIEVER_SERVICE = "rag.retriever.v1.RetrieverService"
ResponseT = TypeVar("ResponseT")


class AsyncRagClient:
    """Talks to a generator and, where its address is given, to a retriever; make it inside an event loop.

    Calls are sent again where a replica was UNAVAILABLE: they leave nothing at the services, or, as changes of the
    corpus do, have a request_id by which they are done once.
    Every method takes `timeout_s`, which wins over the client's; every failed call raises RagClientError.
    """

    def __init__(
        self, generator_address: str, retriever_address: str | None = None, *, timeout_s: float = 60.0
    ) -> None:
        self.generator_address = generator_address
        self.retriever_address = retriever_address
        self._timeout_s = timeout_s
        self._generator_channel = open_channel(generator_address, retry=RetryPolicy([GENERATOR_SERVICE]))
        self._generator: Any = generator_service_pb2_grpc.GeneratorServiceStub(self._generator_channel)
        self._retriever_channel: grpc.aio.Channel | None = None
        self._retriever: Any = None
        if retriever_address is not None:
            self._retriever_channel = open_channel(retriever_address, retry=RetryPolicy([RETRIEVER_SERVICE]))
            self._retriever = retriever_service_pb2_grpc.RetrieverServiceStub(self._retriever_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; calls that still run are cancelled."""
        await self._generator_channel.close()
        if self._retriever_channel is not None:
            await self._retriever_channel.close()

    async def generate(
        self, questions: Input, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Answers questions: one text, several, their tokens, or contexts that the caller retrieved."""
        request = messages.generate_request(questions, options)
        call = self._generator.Generate(request, timeout=self._time(timeout_s))
        return messages.generation(await self._answer(call, self.generator_address))

    async def generate_stream(
        self, questions: Input, *, timeout_s: float | None = None, **options: Unpack[StreamOptions]
    ) -> AsyncGenerator[AnswerPiece | Generation]:
        """Answers as generate does, RAG-Token's piece by piece: AnswerPieces, and the Generation as the last item.

        Closing the iterator before its end cancels the call.
        """
        call = self._generator.GenerateStream(
            messages.stream_request(questions, options), timeout=self._time(timeout_s)
        )
        try:
            async for response in call:
                yield messages.stream_event(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.generator_address) from error
        finally:
            call.cancel()

    async def explain(
        self,
        questions: Input,
        answers: Targets | None = None,
        *,
        skip_answers: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Explanations:
        """Says what answers owe to each document: one answer a question, or else the best generated ones.

        Unless skip_answers, it also says what would be answered without each document.
        """
        request = messages.explain_request(questions, answers, options, skip_answers=skip_answers)
        call = self._generator.Explain(request, timeout=self._time(timeout_s))
        return messages.explanations(await self._answer(call, self.generator_address))

    async def generate_from_contexts(
        self,
        context_input_ids: npt.NDArray[np.integer[Any]],
        context_attention_mask: npt.NDArray[np.integer[Any]],
        doc_scores: npt.NDArray[np.floating[Any]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answers with contexts [batch * n_docs, length] and doc_scores [batch, n_docs]."""
        contexts = Contexts(context_input_ids, context_attention_mask, doc_scores)
        return await self.generate(contexts, timeout_s=timeout_s, **options)

    async def encode_questions(self, questions: Questions, *, timeout_s: float | None = None) -> FloatArray:
        """Returns question_hidden_states: float32 [batch, dim]."""
        request = messages.encode_questions_request(questions)
        call = self._generator.EncodeQuestions(request, timeout=self._time(timeout_s))
        response = await self._answer(call, self.generator_address)
        return messages.array(response.question_hidden_states, "question_hidden_states")

    async def score(
        self,
        questions: Input,
        targets: Targets,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """Gives log p(target | question) of one target a question: texts, or labels [batch, length]."""
        request = messages.score_request(questions, targets, options)
        call = self._generator.Score(request, timeout=self._time(timeout_s))
        return messages.scores(await self._answer(call, self.generator_address))

    async def forward(
        self, given: ForwardInput, *, timeout_s: float | None = None, **options: Unpack[ForwardOptions]
    ) -> ForwardOutputs:
        """Runs the forward pass of Hugging Face's RAG classes over questions, contexts or encoder outputs.

        None is for a call with past_key_values alone. Raises ValueError for an answer that is torn.
        """
        request = forward_request(given, options)
        assembly = ForwardAssembly()
        try:
            async for part in self._generator.Forward(request, timeout=self._time(timeout_s)):
                assembly.add(part)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.generator_address) from error
        return assembly.outputs()

    async def release_past_key_values(self, past_key_values: str, *, timeout_s: float | None = None) -> None:
        """Frees a handle that `forward` returned with use_cache."""
        request = forward_pb2.ReleasePastKeyValuesRequest(past_key_values=past_key_values)
        call = self._generator.ReleasePastKeyValues(request, timeout=self._time(timeout_s))
        await self._answer(call, self.generator_address)

    async def get_model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Describes the model that answers."""
        request = generator_service_pb2.GetModelRequest()
        call = self._generator.GetModel(request, timeout=self._time(timeout_s))
        return messages.model_info(await self._answer(call, self.generator_address))

    async def retrieve(
        self,
        questions: Questions | None,
        question_hidden_states: npt.NDArray[np.floating[Any]] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RetrieveOptions],
    ) -> Retrieval:
        """Finds documents; the generator encodes the questions where `question_hidden_states` are not given.

        Without questions only documents can be had: pass skip_contexts=True.
        """
        stub, address = self._retriever_stub()
        if question_hidden_states is None:
            if questions is None:
                raise TypeError("retrieve needs questions or question_hidden_states")
            question_hidden_states = await self.encode_questions(questions, timeout_s=timeout_s)
        request = messages.retrieve_request(question_hidden_states, questions, options)
        call = stub.Retrieve(request, timeout=self._time(timeout_s))
        return messages.retrieval(await self._answer(call, address))

    async def get_documents(
        self, *, keys: Sequence[str] = (), rows: Sequence[int] = (), timeout_s: float | None = None
    ) -> DocumentLookup:
        """Reads documents by key and by row."""
        stub, address = self._retriever_stub()
        request = retriever_service_pb2.GetDocumentsRequest(keys=keys, rows=rows)
        call = stub.GetDocuments(request, timeout=self._time(timeout_s))
        return messages.lookup(await self._answer(call, address))

    async def get_index(self, *, timeout_s: float | None = None) -> IndexInfo:
        """Describes the index that answers."""
        stub, address = self._retriever_stub()
        call = stub.GetIndex(retriever_service_pb2.GetIndexRequest(), timeout=self._time(timeout_s))
        return messages.index_info(await self._answer(call, address))

    async def upsert_documents(
        self,
        documents: Sequence[CorpusDocument],
        embeddings: npt.NDArray[np.floating[Any]] | None = None,
        *,
        request_id: str | None = None,
        create_only: bool = False,
        batch_size: int = 256,
        timeout_s: float | None = None,
    ) -> Upserted:
        """Writes documents with embeddings [documents, dim], or those that the retriever's encoder makes.

        Each batch is all or nothing. After an error the same call with the same `request_id` writes what is missing.
        """
        stub, address = self._retriever_stub()
        request_id = corpus.new_request_id(request_id)
        requests = corpus.upsert_batches(
            documents, embeddings, request_id, batch_size, create_only=create_only
        )
        responses = await corpus.send_upserts(stub, requests, address, self._time(timeout_s))
        return corpus.upserted(request_id, responses)

    async def delete_documents(
        self,
        keys: Sequence[str],
        *,
        etags: Mapping[str, str] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Deleted:
        """Deletes documents, all or none of them; `etags` by key must be the stored ones."""
        stub, address = self._retriever_stub()
        request_id = corpus.new_request_id(request_id)
        call = stub.DeleteDocuments(
            corpus.delete_request(keys, etags, request_id), timeout=self._time(timeout_s)
        )
        return corpus.deleted(request_id, await self._answer(call, address))

    async def list_documents(
        self, *, page_size: int = 100, timeout_s: float | None = None
    ) -> AsyncGenerator[CorpusDocument]:
        """Yields all documents in the order of their keys; `timeout_s` is for each page."""
        token = ""
        while True:
            page = await self.document_page(token, page_size=page_size, timeout_s=timeout_s)
            for document in page.documents:
                yield document
            token = page.next_page_token
            if not token:
                return

    async def document_page(
        self, page_token: str = "", *, page_size: int = 100, timeout_s: float | None = None
    ) -> DocumentPage:
        """Reads documents in the order of their keys, from the beginning or on from an earlier page's token."""
        stub, address = self._retriever_stub()
        request = retriever_service_pb2.ListDocumentsRequest(page_size=page_size, page_token=page_token)
        call = stub.ListDocuments(request, timeout=self._time(timeout_s))
        return corpus.document_page(await self._answer(call, address))

    async def compact_index(self, *, timeout_s: float | None = None) -> IndexInfo:
        """Writes the corpus into a new snapshot and waits until it serves."""
        begun = await self.begin_compaction(timeout_s=timeout_s)
        return await wait_for(begun, self._operation, self._time(timeout_s))

    async def activate_index(
        self, index_folder: str, *, ignore_callers: bool = False, timeout_s: float | None = None
    ) -> IndexInfo:
        """Lets another index folder of the retriever's serve, waits until it does; going back is the same call.

        With `ignore_callers`, also one that does not fit the question encoders that asked of late.
        """
        begun = await self.begin_activation(index_folder, ignore_callers=ignore_callers, timeout_s=timeout_s)
        return await wait_for(begun, self._operation, self._time(timeout_s))

    async def begin_compaction(self, *, timeout_s: float | None = None) -> Operation:
        """Begins what `compact_index` waits for."""
        stub, address = self._retriever_stub()
        call = stub.CompactIndex(retriever_service_pb2.CompactIndexRequest(), timeout=self._time(timeout_s))
        return operation_of((await self._answer(call, address)).operation, address)

    async def begin_activation(
        self, index_folder: str, *, ignore_callers: bool = False, timeout_s: float | None = None
    ) -> Operation:
        """Begins what `activate_index` waits for."""
        stub, address = self._retriever_stub()
        request = retriever_service_pb2.ActivateIndexRequest(
            index_folder=index_folder, ignore_callers=ignore_callers
        )
        call = stub.ActivateIndex(request, timeout=self._time(timeout_s))
        return operation_of((await self._answer(call, address)).operation, address)

    async def get_operation(self, name: str, *, timeout_s: float | None = None) -> Operation:
        """Says how far an operation is."""
        return await self._operation(name, self._time(timeout_s))

    async def list_operations(self, *, timeout_s: float | None = None) -> list[Operation]:
        """Lists the operations of the retriever's process, newest first."""
        stub, address = self._retriever_stub()
        request = retriever_service_pb2.ListOperationsRequest()
        call = stub.ListOperations(request, timeout=self._time(timeout_s))
        listed = (await self._answer(call, address)).operations
        return [operation_of(one, address) for one in listed]

    async def cancel_operation(self, name: str, *, timeout_s: float | None = None) -> Operation:
        """Asks an operation to stop; it ends with CANCELLED a little later, unless it was faster."""
        stub, address = self._retriever_stub()
        request = retriever_service_pb2.CancelOperationRequest(name=name)
        call = stub.CancelOperation(request, timeout=self._time(timeout_s))
        return operation_of((await self._answer(call, address)).operation, address)

    async def health(self, *, timeout_s: float | None = None) -> dict[str, Health]:
        """Says by service name whether each side serves; a side that does not answer is UNREACHABLE."""
        asked = [(GENERATOR_SERVICE, self._generator_channel)]
        if self._retriever_channel is not None:
            asked.append((RETRIEVER_SERVICE, self._retriever_channel))
        return {name: await self._health(channel, name, self._time(timeout_s)) for name, channel in asked}

    async def _health(self, channel: grpc.aio.Channel, service: str, timeout_s: float) -> Health:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            silent = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
            return Health.UNREACHABLE if silent else Health.UNKNOWN
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return Health(name) if name in Health.__members__ else Health.UNKNOWN

    async def _operation(self, name: str, timeout_s: float) -> Operation:
        stub, address = self._retriever_stub()
        call = stub.GetOperation(retriever_service_pb2.GetOperationRequest(name=name), timeout=timeout_s)
        return operation_of((await self._answer(call, address)).operation, address)

    def _retriever_stub(self) -> tuple[Any, str]:
        if self._retriever is None or self.retriever_address is None:
            raise ValueError("this client was made without a retriever_address")
        return self._retriever, self.retriever_address

    def _time(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    async def _answer(self, call: Awaitable[ResponseT], address: str) -> ResponseT:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address) from error
