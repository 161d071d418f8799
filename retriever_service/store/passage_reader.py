"""Documents with their embeddings by row, out of memory where they were read before."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rag_serving.errors import DataLossError
from retriever_service.bounded_cache import BoundedCache
from retriever_service.store.base import DocumentStore
from retriever_service.types import Document, Float32Array

_OBJECTS_BYTES = 700
"""What Python's objects around the texts and numbers of a passage take, about."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A document and its embedding, float32 [dimension]."""

    document: Document
    embedding: Float32Array


PassageCache = BoundedCache[tuple[DocumentStore, int], Passage]
"""By store and row: what a row holds never changes, so that nothing here can grow old."""


class PassageReader:
    """Reads what a store holds at rows; the cache may be shared by readers of many stores."""

    def __init__(self, store: DocumentStore, cache: PassageCache) -> None:
        self._store = store
        self._cache = cache

    def read(self, rows: Sequence[int]) -> list[Passage]:
        """Returns the passages of distinct rows, replaced ones too, in the order asked: two queries at most.

        Raises DataLossError where a row has no document or no embedding: the index named it.
        """
        known = self._cache.get_all((self._store, row) for row in rows)
        absent = [row for row, passage in zip(rows, known, strict=True) if passage is None]
        if not absent:
            return [passage for passage in known if passage is not None]
        read = self._read(absent)
        self._cache.put_all([((self._store, row), passage, _size(passage)) for row, passage in read.items()])
        return [passage or read[row] for row, passage in zip(rows, known, strict=True)]

    def _read(self, rows: Sequence[int]) -> dict[int, Passage]:
        embeddings = self._store.embeddings_of(rows)
        documents = self._store.documents_by_row(rows, replaced=True)
        missing = [row for row in rows if row not in documents]
        if missing:
            raise DataLossError(f"the index names row {min(missing)}, which the store does not have")
        # Copies: a view would keep the embeddings of all rows read together.
        return {
            row: Passage(documents[row], embedding.copy())
            for row, embedding in zip(rows, embeddings, strict=True)
        }


def _size(passage: Passage) -> int:
    document = passage.document
    texts = (document.title, document.text, document.metadata or "")
    return _OBJECTS_BYTES + passage.embedding.nbytes + sum(sys.getsizeof(text) for text in texts)
