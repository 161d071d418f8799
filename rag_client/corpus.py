"""Changing the corpus: what the client's methods send, and send again, to the retriever."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_client import messages
from rag_client.errors import from_rpc_error
from rag_client.types import CorpusDocument
from rag_serving import tensor_codec

_ATTEMPTS = 4
_FIRST_WAIT_S = 0.2


@dataclass(frozen=True, slots=True)
class Upserted:
    """What an upsert did, now durable: rows and etags in the documents' order."""

    request_id: str
    rows: list[int] = field(default_factory=list)
    etags: list[str] = field(default_factory=list)
    created: int = 0
    replaced: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a delete did, now durable."""

    request_id: str
    deleted: int
    missing_keys: list[str]
    sequence: int


@dataclass(frozen=True, slots=True)
class DocumentPage:
    """Documents by key; `next_page_token` continues and is empty at the end, `total_size` counts the whole corpus."""

    documents: list[CorpusDocument]
    next_page_token: str
    total_size: int


def new_request_id(given: str | None) -> str:
    """Returns the caller's request_id, or one that nobody has used."""
    return given or uuid.uuid4().hex


def upsert_batches(
    documents: Sequence[CorpusDocument],
    embeddings: npt.NDArray[np.floating[Any]] | None,
    request_id: str,
    batch_size: int,
    *,
    create_only: bool,
) -> list[retriever_service_pb2.UpsertDocumentsRequest]:
    """Makes the messages; batch n has the request_id "ID-n". Raises ValueError for embeddings that do not fit."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if embeddings is not None and (np.ndim(embeddings) != 2 or len(embeddings) != len(documents)):
        raise ValueError(
            f"embeddings must be [{len(documents)}, dim], one a document, got {np.shape(embeddings)}"
        )
    if embeddings is not None and np.asarray(embeddings).dtype.kind in "bSU":
        raise ValueError(f"embeddings must be numbers, got {np.asarray(embeddings).dtype}")
    requests = []
    for start in range(0, len(documents), batch_size):
        request = retriever_service_pb2.UpsertDocumentsRequest(
            request_id=f"{request_id}-{start // batch_size}",
            documents=[_message(one) for one in documents[start : start + batch_size]],
            create_only=create_only,
        )
        if embeddings is not None:
            part = np.asarray(embeddings[start : start + batch_size], np.float32)
            request.embeddings.CopyFrom(tensor_codec.encode(part))
        requests.append(request)
    return requests


async def send_upserts(
    stub: Any,
    requests: Sequence[retriever_service_pb2.UpsertDocumentsRequest],
    address: str,
    timeout_s: float,
) -> list[retriever_service_pb2.UpsertDocumentsResponse]:
    """Sends batches until all are acknowledged; those that are not are sent again where the retriever was lost.

    A batch that was written although its acknowledgement was lost is not written twice: its request_id stays.
    """
    ends_at_s = time.monotonic() + timeout_s
    acknowledged: list[retriever_service_pb2.UpsertDocumentsResponse] = []
    for attempt in range(_ATTEMPTS):
        left_s = max(0.0, ends_at_s - time.monotonic())
        try:
            call = stub.UpsertDocuments(iter(requests[len(acknowledged) :]), timeout=left_s)
            async for response in call:
                acknowledged.append(response)  # noqa: PERF401  (those before an error count)
            break
        except grpc.aio.AioRpcError as error:
            wait_s = _FIRST_WAIT_S * 2**attempt
            is_last = attempt == _ATTEMPTS - 1 or time.monotonic() + wait_s >= ends_at_s
            if error.code() is not grpc.StatusCode.UNAVAILABLE or is_last:
                raise from_rpc_error(error, address) from error
            await asyncio.sleep(wait_s)
    return acknowledged


def upserted(request_id: str, responses: Sequence[retriever_service_pb2.UpsertDocumentsResponse]) -> Upserted:
    """Puts the answers to the batches of one upsert together."""
    return Upserted(
        request_id,
        rows=[row for response in responses for row in response.rows],
        etags=[etag for response in responses for etag in response.etags],
        created=sum(response.created for response in responses),
        replaced=sum(response.replaced for response in responses),
        sequence=max((response.sequence for response in responses), default=0),
    )


def delete_request(
    keys: Sequence[str], etags: Mapping[str, str] | None, request_id: str
) -> retriever_service_pb2.DeleteDocumentsRequest:
    """Makes the message. Raises TypeError for a lone string, ValueError for an etag of another key."""
    if isinstance(keys, str):
        raise TypeError("keys must be a sequence of strings, not one string")
    etags = etags or {}
    if others := sorted(set(etags) - set(keys)):
        raise ValueError(f"etags names documents that are not to be deleted: {', '.join(others)}")
    references = [retriever_service_pb2.DocumentReference(key=key, etag=etags.get(key, "")) for key in keys]
    return retriever_service_pb2.DeleteDocumentsRequest(request_id=request_id, documents=references)


def deleted(request_id: str, response: retriever_service_pb2.DeleteDocumentsResponse) -> Deleted:
    """Returns what a response says."""
    return Deleted(request_id, response.deleted, list(response.missing_keys), response.sequence)


def document_page(response: retriever_service_pb2.ListDocumentsResponse) -> DocumentPage:
    """Returns the documents of a page."""
    documents = [messages.corpus_document(one) for one in response.documents]
    return DocumentPage(documents, response.next_page_token, response.total_size)


def _message(given: CorpusDocument) -> document_pb2.Document:
    message = document_pb2.Document(key=given.key, title=given.title, text=given.text, etag=given.etag)
    if given.metadata is not None:
        message.metadata.SetInParent()
        try:
            message.metadata.update(given.metadata)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the metadata of {given.key!r} cannot be sent: {error}") from error
    return message
