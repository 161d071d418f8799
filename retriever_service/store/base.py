"""The contract of a document store."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from retriever_service.filters import Filter
from retriever_service.types import Document, Float32Array, Int64Array, Selection


class DocumentStore(ABC):
    """Documents and their exact embeddings; keys are unique, and no row is ever given twice.

    In a store that changes, a document that is overwritten gets a new row, so that what a row holds never
    changes. The old row stays readable to a search that found it, but is no document of the store any more.

    Reading is safe from many threads at once. Reads of a batch are one query, whatever its size, and what
    is read was written together: a document never comes with another's embedding.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def documents_by_row(self, rows: Sequence[int], *, replaced: bool = False) -> Mapping[int, Document]:
        """Returns the documents of those rows that exist; repeated rows are read once.

        With `replaced`, also of rows whose document was overwritten or deleted meanwhile.
        """

    @abstractmethod
    def documents_by_key(self, keys: Sequence[str]) -> Mapping[str, Document]:
        """Returns the documents of those keys that exist; repeated keys are read once."""

    @abstractmethod
    def embeddings_of(self, rows: Sequence[int]) -> Float32Array:
        """Returns float32 [len(rows), dimension], in the order asked.

        Raises DataLossError where a row has no embedding: the index named it, so it must exist.
        """

    @property
    def version(self) -> int:
        """Number of the last change that is shown to searches; 0 in a store that does not change."""
        return 0

    @abstractmethod
    def rows(self) -> Int64Array:
        """Returns the rows int64, ascending, of all documents."""

    @property
    @abstractmethod
    def next_row(self) -> int:
        """The first row that no document has had yet."""

    @abstractmethod
    def rows_between(self, first: int, stop: int) -> Int64Array:
        """Returns the rows int64, ascending, of the documents among rows first to stop - 1."""

    @abstractmethod
    def rows_where(self, condition: Filter) -> Int64Array:
        """Returns the rows int64, ascending, of the documents whose metadata meet the condition."""

    def select(self, condition: Filter) -> Selection:
        """Returns what tells a search to find only documents whose metadata meet the condition."""
        return Selection(self.rows_where(condition))

    @abstractmethod
    def close(self) -> None:
        """Closes what this store holds open; later reads fail."""
