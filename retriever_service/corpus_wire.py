"""Documents, changes and operations of rag.retriever.v1: protobuf <-> domain; what is wrong is refused by name."""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving import struct_codec, tensor_codec
from rag_serving.errors import InvalidArgumentError
from retriever_service.corpus.base import Delete, NewDocument, Page
from retriever_service.embedding_rule import first_refused
from retriever_service.index.manifest import Embedding
from retriever_service.types import MAX_METADATA_DEPTH, Document, Float32Array, metadata_depth

_MAX_KEY_BYTES = 1024
_MAX_REQUEST_ID_BYTES = 256
_MAX_METADATA_BYTES = 1 << 16
# What a message has beside its documents' own bytes: a tag and a length for each, a token and a total for all.
_MAX_ELEMENT_BYTES = 6
_MAX_PAGE_FIELDS_BYTES = 2048


@dataclass(frozen=True, slots=True)
class ChangeLimits:
    """What a change, a listing or a reading may ask for; `max_message_bytes` are an answer's."""

    max_documents: int = 1000
    max_text_bytes: int = 1 << 20
    max_message_bytes: int = 64 << 20


def document(found: Document) -> document_pb2.Document:
    """Returns a document as it goes on the wire."""
    return document_pb2.Document(
        key=found.key,
        row=found.row,
        title=found.title,
        text=found.text,
        metadata=None if found.metadata is None else _struct(found.metadata),
        etag=found.etag,
    )


def read_documents(
    request: retriever_service_pb2.UpsertDocumentsRequest, limits: ChangeLimits
) -> list[NewDocument]:
    """Returns the documents of a batch. Raises InvalidArgumentError naming the first wrong field."""
    check_request_id(request.request_id)
    _check_count(len(request.documents), limits)
    keys: dict[str, int] = {}
    documents: list[NewDocument] = []
    for position, given in enumerate(request.documents):
        field = f"documents[{position}]"
        _check_key(f"{field}.key", given.key, position, keys)
        _check_text(f"{field}.title", given.title, limits)
        _check_text(f"{field}.text", given.text, limits, required=True)
        metadata = _metadata(f"{field}.metadata", given.metadata) if given.HasField("metadata") else None
        documents.append(NewDocument(given.key, given.title, given.text, metadata, given.etag))
    return documents


def read_embeddings(
    request: retriever_service_pb2.UpsertDocumentsRequest, dimension: int, embedding: Embedding
) -> Float32Array | None:
    """Returns float32 [documents, dim], None where none came. Raises InvalidArgumentError."""
    field = "embeddings"
    if not request.HasField("embeddings"):
        return None
    vectors: Float32Array = tensor_codec.decode(
        request.embeddings, field, dtypes=tensor_codec.FLOATS, ndim=2, finite=True, widen=True
    )
    if len(vectors) != len(request.documents):
        raise InvalidArgumentError(field, f"{len(vectors)} rows for {len(request.documents)} documents")
    if vectors.shape[1] != dimension:
        raise InvalidArgumentError(
            field, f"the index has dimension {dimension}, the embeddings have {vectors.shape[1]}"
        )
    refused = first_refused(vectors, unit=bool(embedding.normalize))
    if refused is not None:
        raise InvalidArgumentError(f"{field}[{refused.position}]", refused.reason, refused.length)
    return vectors


def read_delete(request: retriever_service_pb2.DeleteDocumentsRequest, limits: ChangeLimits) -> Delete:
    """Returns what is to be deleted. Raises InvalidArgumentError naming the first wrong field."""
    check_request_id(request.request_id)
    _check_count(len(request.documents), limits)
    keys: dict[str, int] = {}
    for position, given in enumerate(request.documents):
        _check_key(f"documents[{position}].key", given.key, position, keys)
    references = [(given.key, given.etag) for given in request.documents]
    return Delete(request.request_id, digest_of(request), references)


def read_page(
    request: retriever_service_pb2.ListDocumentsRequest, limits: ChangeLimits
) -> tuple[str | None, int]:
    """Returns the key that the page comes after, and its size. Raises InvalidArgumentError."""
    if not 0 <= request.page_size <= limits.max_documents:
        raise InvalidArgumentError("page_size", f"must be 0 to {limits.max_documents}", request.page_size)
    after: str | None = None
    if request.page_token:
        try:
            after = base64.b64decode(request.page_token.encode(), altchars=b"-_", validate=True).decode()
        except (binascii.Error, UnicodeError, ValueError) as error:
            raise InvalidArgumentError(
                "page_token", "is none that this service gave", request.page_token
            ) from error
    return after, request.page_size or min(100, limits.max_documents)


def page_response(
    page: Page, total_size: int, limits: ChangeLimits
) -> retriever_service_pb2.ListDocumentsResponse:
    """Returns as much of a page as a message holds, one document at least; the next page goes on behind it."""
    max_bytes = limits.max_message_bytes - _MAX_PAGE_FIELDS_BYTES
    documents = documents_within(map(document, page.documents), max_bytes)
    if page.documents and not documents:
        documents = [document(page.documents[0])]
    more = page.more or len(documents) < len(page.documents)
    return retriever_service_pb2.ListDocumentsResponse(
        documents=documents,
        next_page_token=_page_token(documents[-1].key) if more else "",
        total_size=total_size,
    )


def documents_within(made: Iterable[document_pb2.Document], max_bytes: int) -> list[document_pb2.Document]:
    """Returns the first of these documents, as many as so many bytes of a message hold."""
    documents: list[document_pb2.Document] = []
    for one in made:
        max_bytes -= one.ByteSize() + _MAX_ELEMENT_BYTES
        if max_bytes < 0:
            break
        documents.append(one)
    return documents


def _page_token(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def digest_of(request: Any) -> str:
    """Returns what two requests of one request_id must share."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


def timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """Returns seconds since the epoch as a Timestamp."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromMilliseconds(int(seconds * 1000))
    return stamp


def check_request_id(request_id: str) -> None:
    """Raises InvalidArgumentError where it is too long to be remembered."""
    size_bytes = len(request_id.encode())
    if size_bytes > _MAX_REQUEST_ID_BYTES:
        raise InvalidArgumentError("request_id", f"at most {_MAX_REQUEST_ID_BYTES} bytes", size_bytes)


def _check_count(count: int, limits: ChangeLimits) -> None:
    if not 1 <= count <= limits.max_documents:
        raise InvalidArgumentError("documents", f"must be 1 to {limits.max_documents} documents", count)


def _check_key(field: str, key: str, position: int, keys: dict[str, int]) -> None:
    size_bytes = len(key.encode())
    if not 1 <= size_bytes <= _MAX_KEY_BYTES:
        raise InvalidArgumentError(field, f"must have 1 to {_MAX_KEY_BYTES} bytes", size_bytes)
    if key in keys:
        raise InvalidArgumentError(field, f"is documents[{keys[key]}]'s already", key)
    keys[key] = position


def _check_text(field: str, text: str, limits: ChangeLimits, *, required: bool = False) -> None:
    if required and not text:
        raise InvalidArgumentError(field, "is empty")
    size_bytes = len(text.encode())
    if size_bytes > limits.max_text_bytes:
        raise InvalidArgumentError(field, f"at most {limits.max_text_bytes} bytes", size_bytes)


def _metadata(field: str, given: struct_pb2.Struct) -> str:
    try:
        fields = struct_codec.decode(given)
        if metadata_depth(fields) > MAX_METADATA_DEPTH:
            raise InvalidArgumentError(field, f"is nested more than {MAX_METADATA_DEPTH} levels deep")
        text = json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (ValueError, json_format.Error, RecursionError) as error:
        raise InvalidArgumentError(field, f"is no JSON object: {error}") from error
    if len(text.encode()) > _MAX_METADATA_BYTES:
        raise InvalidArgumentError(field, f"at most {_MAX_METADATA_BYTES} bytes of JSON", len(text.encode()))
    return text


def _struct(metadata: str) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(json.loads(metadata, parse_int=_wire_integer))
    return struct


def _wire_integer(digits: str) -> float | str:
    """A Struct's numbers are doubles: an integer beyond them, which old corpora may hold, goes as its digits."""
    number = float(digits)
    return number if math.isfinite(number) else digits
