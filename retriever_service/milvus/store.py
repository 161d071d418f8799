"""Documents of a Milvus collection, behind the contract of a document store."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rag_serving.errors import DataLossError
from retriever_service.corpus.base import Page
from retriever_service.filters import Filter
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.index import Matching
from retriever_service.milvus.schema import behind
from retriever_service.milvus.state import Shown, State
from retriever_service.milvus.terms import expression
from retriever_service.store.base import DocumentStore
from retriever_service.types import Document, Float32Array, Int64Array, Selection

_FIELDS = ("row", "key", "title", "text", "metadata")
_ROWS_PER_QUERY = 1000
_DOCUMENTS_PER_QUERY = 250  # of 200 KB at most: Milvus gives answers of 100 MB
_LARGEST_ROW = 2**63 - 1


class MilvusStore(DocumentStore):
    """Reads one collection as `shown` says."""

    def __init__(
        self, connection: MilvusConnection, collection: str, dimension: int, shown: Shown, etag_prefix: str
    ) -> None:
        self._connection = connection
        self._collection = collection
        self._dimension = dimension
        self._shown = shown
        self._etag_prefix = etag_prefix

    def __len__(self) -> int:
        return self._shown.state.num_documents

    @property
    def version(self) -> int:
        """Number of the last change that is shown: see DocumentStore."""
        return self._shown.state.sequence

    def etag(self, row: int) -> str:
        """Returns the etag of the version that a row holds."""
        return f"{self._etag_prefix}-{row:x}"

    def documents_by_row(self, rows: Sequence[int], *, replaced: bool = False) -> Mapping[int, Document]:
        """Returns the documents of rows: see DocumentStore."""
        state = self._shown.state
        wanted = [row for row in dict.fromkeys(rows) if 0 <= row <= _LARGEST_ROW]
        if not replaced:
            wanted = [row for row in wanted if state.shows(row)]
        condition = state.expression(hidden=True)
        return {one.row: one for one in self._read("row", wanted, condition, state.timestamp)}

    def documents_by_key(self, keys: Sequence[str]) -> Mapping[str, Document]:
        """Returns the documents of keys: see DocumentStore."""
        wanted = [key.encode().hex() for key in dict.fromkeys(keys)]
        state = self._shown.state
        return {one.key: one for one in self._read("key", wanted, state.expression(), state.timestamp)}

    def rows_of(self, keys: Sequence[str], state: State) -> dict[str, int]:
        """Returns the row of each key that has a document in that state."""
        rows: dict[str, int] = {}
        for some in _chunks([key.encode().hex() for key in keys]):
            condition = f"{state.expression()} and key in {json.dumps(some)}"
            found = self._query(condition, ["key", "row"], state.timestamp)
            rows |= {_key(one["key"]): int(one["row"]) for one in found}
        return rows

    def embeddings_of(self, rows: Sequence[int]) -> Float32Array:
        """Returns the embeddings of rows: see DocumentStore."""
        vectors: dict[int, Float32Array] = {}
        timestamp = self._shown.state.timestamp
        for some in _chunks(list(dict.fromkeys(rows))):
            for one in self._query(f"row in {some}", ["row", "embedding"], timestamp):
                vectors[int(one["row"])] = np.asarray(one["embedding"], dtype=np.float32)
        missing = [row for row in rows if row not in vectors]
        if missing:
            raise DataLossError(f"Milvus has no embedding of row {missing[0]} in {self._collection}")
        if not len(rows):
            return np.empty((0, self._dimension), np.float32)
        return np.stack([vectors[row] for row in rows])

    def rows(self) -> Int64Array:
        """Returns the rows of all documents: see DocumentStore."""
        return self._rows(self._shown.state.expression())

    @property
    def next_row(self) -> int:
        """The first row that no document has had: see DocumentStore."""
        return self._shown.state.next_row

    def rows_between(self, first: int, stop: int) -> Int64Array:
        """Returns the rows of the documents among these rows: see DocumentStore."""
        return self._rows(f"{self._shown.state.expression()} and row >= {first} and row < {stop}")

    def rows_where(self, condition: Filter) -> Int64Array:
        """Returns the rows of the documents that meet the condition: see DocumentStore."""
        return self._rows(f"{self._shown.state.expression()} and {expression(condition)}")

    def select(self, condition: Filter) -> Selection:
        """Returns the condition for Milvus to evaluate: see DocumentStore."""
        return Matching(expression(condition))

    def page(self, after_key: str | None, size: int) -> Page:
        """Returns documents by key: see Corpus."""
        after = "" if after_key is None else behind(after_key)
        documents: list[Document] = []
        for found in self._in_order(
            after, self._shown.state.expression(), _FIELDS, min(size + 1, _DOCUMENTS_PER_QUERY)
        ):
            documents += [self._document(one) for one in found]
            if len(documents) > size:
                break
        return Page(documents[:size], more=len(documents) > size)

    def close(self) -> None:
        """Nothing is open: the connection is the corpus's."""

    def _rows(self, condition: str) -> Int64Array:
        batches = self._in_order("", condition, ("row",), _ROWS_PER_QUERY)
        return np.sort(np.fromiter((one["row"] for found in batches for one in found), dtype=np.int64))

    def _in_order(
        self, after: str, condition: str, fields: Sequence[str], size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields entities by primary key, up to `size` at once."""
        while True:
            found = self._connection.first(
                self._collection, f'id > "{after}" and {condition}', ["id", *fields], size
            )
            if not found:
                return
            yield found
            after = found[-1]["id"]

    def _read(
        self, field: str, values: Sequence[int] | Sequence[str], condition: str, timestamp: int
    ) -> list[Document]:
        documents: list[Document] = []
        for some in _chunks(list(values), _DOCUMENTS_PER_QUERY):
            found = self._query(f"{condition} and {field} in {json.dumps(some)}", _FIELDS, timestamp)
            documents += [self._document(one) for one in found]
        return documents

    def _query(self, condition: str, fields: Sequence[str], timestamp: int) -> list[dict[str, Any]]:
        return self._connection.query(self._collection, condition, fields, at=timestamp)

    def _document(self, found: Mapping[str, Any]) -> Document:
        row = int(found["row"])
        return Document(
            row,
            _key(found["key"]),
            found["title"],
            found["text"],
            found["metadata"] or None,
            self.etag(row),
        )


def _key(hexadecimal: str) -> str:
    return bytes.fromhex(hexadecimal).decode()


def _chunks(values: list[Any], size: int = _ROWS_PER_QUERY) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
