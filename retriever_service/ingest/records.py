"""One passage of a corpus on its way into an index, and the checks that it must pass."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from retriever_service.embedding_rule import first_refused
from retriever_service.errors import BuildError
from retriever_service.types import MAX_METADATA_DEPTH, Float32Array, metadata_depth

MAX_TEXT_BYTES = 1 << 20
MAX_KEY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """A passage with where it came from, for messages. `key` None takes the row number as its key.

    `metadata` is JSON or None; `embedding` is float32 [dim] where the corpus brings it along.
    """

    where: str
    key: str | None
    title: str
    text: str
    metadata: str | None = None
    embedding: Float32Array | None = None


def checked_record(fields: dict[str, Any], where: str, max_text_bytes: int = MAX_TEXT_BYTES) -> Record:
    """Makes a record of key, title, text, metadata and embedding; all but text may be missing.

    Raises BuildError that begins with `where`.
    """
    key = fields.get("key")
    if key is not None and (not isinstance(key, str | int) or isinstance(key, bool)):
        raise BuildError(f"{where}: key must be a string, got {type(key).__name__}")
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise BuildError(f"{where}: metadata must be an object, got {type(metadata).__name__}")
    title = fields.get("title")
    return Record(
        where=where,
        key=None if key is None else _checked_text(str(key), "key", where, MAX_KEY_BYTES, required=True),
        title=_checked_text("" if title is None else title, "title", where, max_text_bytes),
        text=_checked_text(fields.get("text"), "text", where, max_text_bytes, required=True),
        metadata=None if metadata is None else _checked_metadata(metadata, where),
        embedding=_checked_embedding(fields.get("embedding"), where),
    )


def _checked_text(text: object, field: str, where: str, max_bytes: int, *, required: bool = False) -> str:
    if not isinstance(text, str):
        what = "missing" if text is None else f"must be a string, got {type(text).__name__}"
        raise BuildError(f"{where}: {field} {'is ' if text is None else ''}{what}")
    if required and not text:
        raise BuildError(f"{where}: {field} is empty")
    checked_size(text, field, where, max_bytes)
    return text


def checked_size(text: str, field: str, where: str, max_bytes: int) -> None:
    """Raises BuildError for a text of more bytes in UTF-8, or one that has no UTF-8."""
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise BuildError(f"{where}: {field} is not valid Unicode: {error.reason}") from error
    if size_bytes > max_bytes:
        raise BuildError(f"{where}: {field} has {size_bytes} bytes, at most {max_bytes} are allowed")


def _checked_metadata(metadata: dict[str, Any], where: str) -> str:
    if metadata_depth(metadata) > MAX_METADATA_DEPTH:
        raise BuildError(f"{where}: metadata is nested more than {MAX_METADATA_DEPTH} levels deep")
    try:
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BuildError(f"{where}: metadata is not JSON: {error}") from error
    checked_size(text, "metadata", where, sys.maxsize)
    if not _fits_doubles(metadata):
        raise BuildError(
            f"{where}: metadata has an integer beyond ±{sys.float_info.max:.2g}, the largest double"
        )
    return text


def _fits_doubles(value: object) -> bool:
    """Whether all integers can go on the wire, whose numbers are doubles."""
    if isinstance(value, dict | list):
        return all(map(_fits_doubles, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) <= sys.float_info.max


def _checked_embedding(embedding: object, where: str) -> Float32Array | None:
    if embedding is None:
        return None
    if not _holds_numbers(embedding):
        raise BuildError(f"{where}: embedding must be a list of numbers")
    try:
        vector = np.asarray(embedding, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise BuildError(f"{where}: embedding must be a list of numbers") from error
    if vector.ndim != 1 or vector.size == 0:
        raise BuildError(f"{where}: embedding must be a list of numbers, got shape {list(vector.shape)}")
    refused = first_refused(vector[None])
    if refused is not None:
        raise BuildError(f"{where}: embedding {refused.reason}")
    return vector


def _holds_numbers(embedding: object) -> bool:
    """Whether there are numbers alone: numpy would read True and "3" as some, too."""
    if isinstance(embedding, list):
        return set(map(type, embedding)) <= {float, int}
    return isinstance(embedding, np.ndarray) and embedding.dtype.kind in "fiu"
