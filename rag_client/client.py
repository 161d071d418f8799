"""The client for ordinary code: AsyncRagClient behind methods that wait."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy as np
import numpy.typing as npt

from rag_client.aio import AsyncRagClient
from rag_client.corpus import Deleted, DocumentPage, Upserted
from rag_client.forward import ForwardInput
from rag_client.messages import Input, Questions, Targets
from rag_client.operation import Operation
from rag_client.options import (
    ForwardOptions,
    GenerateOptions,
    RetrieveOptions,
    ScoreOptions,
    StreamOptions,
)
from rag_client.types import (
    AnswerPiece,
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

ResultT = TypeVar("ResultT")


class RagClient:
    """Talks to a generator and, where its address is given, to a retriever; threads may share it.

    Its calls run on an event loop in a thread of its own, until `close` or the end of its `with` block. Every
    method takes `timeout_s`, which wins over the client's; every failed call raises RagClientError.
    """

    def __init__(
        self, generator_address: str, retriever_address: str | None = None, *, timeout_s: float = 60.0
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rag-client", daemon=True)
        self._thread.start()
        self._client = self._wait(_opened(generator_address, retriever_address, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels and ends the thread; a second call does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(
        self, questions: Input, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Answers questions: one text, several, their tokens, or contexts that the caller retrieved."""
        return self._wait(self._client.generate(questions, timeout_s=timeout_s, **options))

    def generate_stream(
        self, questions: Input, *, timeout_s: float | None = None, **options: Unpack[StreamOptions]
    ) -> Iterator[AnswerPiece | Generation]:
        """Answers as generate does, RAG-Token's piece by piece: AnswerPieces, and the Generation as the last item.

        Closing the iterator before its end cancels the call.
        """
        events = self._client.generate_stream(questions, timeout_s=timeout_s, **options)
        try:
            while (event := self._wait(_next(events))) is not None:
                yield event
        finally:
            if not self._loop.is_closed():
                self._wait(events.aclose())

    def explain(
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
        call = self._client.explain(
            questions, answers, skip_answers=skip_answers, timeout_s=timeout_s, **options
        )
        return self._wait(call)

    def generate_from_contexts(
        self,
        context_input_ids: npt.NDArray[np.integer[Any]],
        context_attention_mask: npt.NDArray[np.integer[Any]],
        doc_scores: npt.NDArray[np.floating[Any]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answers with contexts [batch * n_docs, length] and doc_scores [batch, n_docs]."""
        call = self._client.generate_from_contexts(
            context_input_ids, context_attention_mask, doc_scores, timeout_s=timeout_s, **options
        )
        return self._wait(call)

    def encode_questions(self, questions: Questions, *, timeout_s: float | None = None) -> FloatArray:
        """Returns question_hidden_states: float32 [batch, dim]."""
        return self._wait(self._client.encode_questions(questions, timeout_s=timeout_s))

    def score(
        self,
        questions: Input,
        targets: Targets,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """Gives log p(target | question) of one target a question: texts, or labels [batch, length]."""
        return self._wait(self._client.score(questions, targets, timeout_s=timeout_s, **options))

    def forward(
        self, given: ForwardInput, *, timeout_s: float | None = None, **options: Unpack[ForwardOptions]
    ) -> ForwardOutputs:
        """Runs the forward pass of Hugging Face's RAG classes over questions, contexts or encoder outputs.

        None is for a call with past_key_values alone. Raises ValueError for an answer that is torn.
        """
        return self._wait(self._client.forward(given, timeout_s=timeout_s, **options))

    def release_past_key_values(self, past_key_values: str, *, timeout_s: float | None = None) -> None:
        """Frees a handle that `forward` returned with use_cache."""
        self._wait(self._client.release_past_key_values(past_key_values, timeout_s=timeout_s))

    def get_model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Describes the model that answers."""
        return self._wait(self._client.get_model(timeout_s=timeout_s))

    def retrieve(
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
        call = self._client.retrieve(questions, question_hidden_states, timeout_s=timeout_s, **options)
        return self._wait(call)

    def get_documents(
        self, *, keys: Sequence[str] = (), rows: Sequence[int] = (), timeout_s: float | None = None
    ) -> DocumentLookup:
        """Reads documents by key and by row."""
        return self._wait(self._client.get_documents(keys=keys, rows=rows, timeout_s=timeout_s))

    def get_index(self, *, timeout_s: float | None = None) -> IndexInfo:
        """Describes the index that answers."""
        return self._wait(self._client.get_index(timeout_s=timeout_s))

    def upsert_documents(
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
        call = self._client.upsert_documents(
            documents,
            embeddings,
            request_id=request_id,
            create_only=create_only,
            batch_size=batch_size,
            timeout_s=timeout_s,
        )
        return self._wait(call)

    def delete_documents(
        self,
        keys: Sequence[str],
        *,
        etags: Mapping[str, str] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Deleted:
        """Deletes documents, all or none of them; `etags` by key must be the stored ones."""
        call = self._client.delete_documents(keys, etags=etags, request_id=request_id, timeout_s=timeout_s)
        return self._wait(call)

    def list_documents(
        self, *, page_size: int = 100, timeout_s: float | None = None
    ) -> Iterator[CorpusDocument]:
        """Yields all documents in the order of their keys; `timeout_s` is for each page."""
        documents = self._client.list_documents(page_size=page_size, timeout_s=timeout_s)
        try:
            while (document := self._wait(_next(documents))) is not None:
                yield document
        finally:
            if not self._loop.is_closed():
                self._wait(documents.aclose())

    def document_page(
        self, page_token: str = "", *, page_size: int = 100, timeout_s: float | None = None
    ) -> DocumentPage:
        """Reads documents in the order of their keys, from the beginning or on from an earlier page's token."""
        return self._wait(self._client.document_page(page_token, page_size=page_size, timeout_s=timeout_s))

    def compact_index(self, *, timeout_s: float | None = None) -> IndexInfo:
        """Writes the corpus into a new snapshot and waits until it serves."""
        return self._wait(self._client.compact_index(timeout_s=timeout_s))

    def activate_index(
        self, index_folder: str, *, ignore_callers: bool = False, timeout_s: float | None = None
    ) -> IndexInfo:
        """Lets another index folder of the retriever's serve, waits until it does; going back is the same call.

        With `ignore_callers`, also one that does not fit the question encoders that asked of late.
        """
        call = self._client.activate_index(index_folder, ignore_callers=ignore_callers, timeout_s=timeout_s)
        return self._wait(call)

    def begin_compaction(self, *, timeout_s: float | None = None) -> Operation:
        """Begins what `compact_index` waits for."""
        return self._wait(self._client.begin_compaction(timeout_s=timeout_s))

    def begin_activation(
        self, index_folder: str, *, ignore_callers: bool = False, timeout_s: float | None = None
    ) -> Operation:
        """Begins what `activate_index` waits for."""
        call = self._client.begin_activation(index_folder, ignore_callers=ignore_callers, timeout_s=timeout_s)
        return self._wait(call)

    def get_operation(self, name: str, *, timeout_s: float | None = None) -> Operation:
        """Says how far an operation is."""
        return self._wait(self._client.get_operation(name, timeout_s=timeout_s))

    def list_operations(self, *, timeout_s: float | None = None) -> list[Operation]:
        """Lists the operations of the retriever's process, newest first."""
        return self._wait(self._client.list_operations(timeout_s=timeout_s))

    def cancel_operation(self, name: str, *, timeout_s: float | None = None) -> Operation:
        """Asks an operation to stop; it ends with CANCELLED a little later, unless it was faster."""
        return self._wait(self._client.cancel_operation(name, timeout_s=timeout_s))

    def health(self, *, timeout_s: float | None = None) -> dict[str, Health]:
        """Says by service name whether each side serves; a side that does not answer is UNREACHABLE."""
        return self._wait(self._client.health(timeout_s=timeout_s))

    def _wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt of the waiting thread must not leave the call running
            future.cancel()
            raise


async def _next(events: AsyncIterator[ResultT]) -> ResultT | None:
    return await anext(events, None)


async def _opened(generator_address: str, retriever_address: str | None, timeout_s: float) -> AsyncRagClient:
    return AsyncRagClient(generator_address, retriever_address, timeout_s=timeout_s)
