"""Documents to write into a corpus, a JSON object on each line, read in batches."""

import codecs
import gzip
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rag_client.errors import FieldViolation
from rag_client.types import CorpusDocument

STDIN = "-"
# Bytes of lines of a batch, unless one line has more: far below what a gRPC message may have.
_MAX_BATCH_BYTES = 4 << 20
_TEXTS = ("key", "title", "text", "etag")
_KNOWN = frozenset({*_TEXTS, "metadata", "embedding", "row"})
# How the service names a document of a batch, and another one of it that has the same key.
_NUMBERED = re.compile(r"^(is )?(documents|embeddings)\[(\d+)\](?:\.(\w+))?")


class DocumentFileError(ValueError):
    """The file cannot be read, or a line of it is no document; the message has the line's number."""


@dataclass(slots=True)
class DocumentBatch:
    """Documents with their embeddings, float32 [documents, dim], or without; `size_bytes` of lines.

    `places` has file and line of each document.
    """

    documents: list[CorpusDocument] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def embeddings(self) -> npt.NDArray[np.float32] | None:
        """The embeddings, None where the lines have none."""
        return np.stack(self.vectors) if self.vectors else None

    def placed(self, violation: FieldViolation) -> FieldViolation:
        """Names the line of what is wrong, where the service names the document's number in the batch."""
        return FieldViolation(
            _NUMBERED.sub(self._place, violation.field), _NUMBERED.sub(self._place, violation.description)
        )

    def _place(self, found: re.Match[str]) -> str:
        before, what, number, inner = found.groups()
        if int(number) >= len(self.places):
            return found[0]
        inner = "embedding" if what == "embeddings" else inner
        return (before or "") + self.places[int(number)] + (f": {inner}" if inner else "")


@contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """Opens a file, one that ends in .gz, or with "-" the standard input. Raises DocumentFileError."""
    try:
        if name == STDIN:
            source: Any = nullcontext(sys.stdin.buffer)
        else:
            source = gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")  # noqa: PTH123, SIM115
        with source as stream:
            yield stream
    except (OSError, EOFError) as error:
        raise DocumentFileError(f"cannot read {name}: {error}") from error


def read_batches(stream: IO[bytes], name: str, batch_size: int) -> Iterator[DocumentBatch]:
    """Reads {"key": …, "text": …} a line, with "title", "metadata", "embedding" and "etag" where they are there.

    The same lines and `batch_size` make the same batches. All lines have an embedding, of one dimension, or none
    has. "row" is not read: so what `rag documents list --json` prints can be written. Raises DocumentFileError.
    """
    batch, dimension = DocumentBatch(), None
    for number, given in enumerate(stream, 1):
        line = given.removeprefix(codecs.BOM_UTF8) if number == 1 else given
        if batch.documents and (
            len(batch.documents) >= batch_size or batch.size_bytes + len(line) > _MAX_BATCH_BYTES
        ):
            yield batch
            batch = DocumentBatch()
        batch.size_bytes += len(given)
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        fields = _fields(line, where)
        batch.documents.append(_document(fields, where))
        batch.places.append(where)
        vector = _vector(fields.get("embedding"), where)
        found = 0 if vector is None else len(vector)
        if dimension not in {None, found}:
            raise DocumentFileError(f"{where}: embedding has {found} numbers, those before have {dimension}")
        dimension = found
        if vector is not None:
            batch.vectors.append(vector)
    if batch.documents:
        yield batch


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields: Any = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DocumentFileError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DocumentFileError(f"{where}: must be a JSON object, got {type(fields).__name__}")
    if unknown := sorted(set(fields) - _KNOWN):
        raise DocumentFileError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_KNOWN))}")
    return fields


def _document(fields: dict[str, Any], where: str) -> CorpusDocument:
    texts = {name: "" if fields.get(name) is None else fields[name] for name in _TEXTS}
    if isinstance(texts["key"], int) and not isinstance(
        texts["key"], bool
    ):  # rag-index build takes them, too
        texts["key"] = str(texts["key"])
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DocumentFileError(f"{where}: {name} must be a string, got {type(text).__name__}")
    for name in ("key", "text"):
        if not texts[name]:
            raise DocumentFileError(f"{where}: {name} is missing")
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise DocumentFileError(f"{where}: metadata must be an object, got {type(metadata).__name__}")
    try:
        json.dumps([texts, metadata], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DocumentFileError(f"{where}: not valid Unicode: {error.reason}") from error
    return CorpusDocument(texts["key"], texts["text"], texts["title"], metadata, texts["etag"])


def _vector(embedding: object, where: str) -> npt.NDArray[np.float32] | None:
    if embedding is None:
        return None
    if not isinstance(embedding, list) or not set(map(type, embedding)) <= {float, int}:
        raise DocumentFileError(f"{where}: embedding must be a list of numbers")
    try:
        with np.errstate(over="ignore"):  # what overflows is refused below
            vector = np.asarray(embedding, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DocumentFileError(f"{where}: embedding must be a list of numbers") from error
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise DocumentFileError(f"{where}: embedding must be a list of finite numbers")
    return vector
