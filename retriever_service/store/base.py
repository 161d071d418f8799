"""The contract of a document store."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from retriever_service.filters import Filter
from retriever_service.types import Document, Float32Array, Int64Array


class DocumentStore(ABC):
    """Documents and their exact embeddings; rows are 0 … len - 1, keys are unique.

    Reading is safe from many threads at once. Reads of a batch are one query, whatever its size, and what
    is read was written together: a document never comes with another's embedding.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def documents_by_row(self, rows: Sequence[int]) -> Mapping[int, Document]:
        """Returns the documents of those rows that exist; repeated rows are read once."""

    @abstractmethod
    def documents_by_key(self, keys: Sequence[str]) -> Mapping[str, Document]:
        """Returns the documents of those keys that exist; repeated keys are read once."""

    @abstractmethod
    def embeddings_of(self, rows: Sequence[int]) -> Float32Array:
        """Returns float32 [len(rows), dimension], in the order asked.

        Raises DataLossError where a row has no embedding: the index named it, so it must exist.
        """

    @abstractmethod
    def rows_where(self, condition: Filter) -> Int64Array:
        """Returns the rows int64, ascending, of the documents whose metadata meet the condition."""

    @abstractmethod
    def close(self) -> None:
        """Closes what this store holds open; later reads fail."""
