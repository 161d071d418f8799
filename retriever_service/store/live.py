"""The corpus as it is now: the documents of a build, which never change, and every change since.

The build's documents.sqlite stays as it was written. The changes lie beside it in a SQLite file of their own
(write-ahead log, synchronous=FULL): the new versions of documents with their embeddings, the rows of the build
that are hidden by them, a log of all changes with a sequence that only grows, and the request_ids of late. Both
files together are the truth that every index is derived from.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.errors import DamagedIndexError, UnreadableChangesError
from retriever_service.filters import Filter
from retriever_service.store.filter_sql import where_clause
from retriever_service.store.live_connection import LiveConnection, open_live
from retriever_service.store.matching_rows import MatchingRows
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Document, Int64Array, Selection


@dataclass(frozen=True, slots=True)
class LoggedChange:
    """One change of the log: the row written, None for a deletion, and the row that it replaces, if any."""

    sequence: int
    row: int | None
    replaced_row: int | None


class LiveStore(SqliteStore):
    """Reads a build and its changes: one connection for each thread, opened as threads come."""

    _schema = "base"

    def __init__(self, base_file: Path, changes_file: Path | None, dimension: int, etag_prefix: str) -> None:
        """`changes_file` None reads the build alone. Raises DamagedIndexError naming a file that is no store."""
        self._changes_file = changes_file
        self._etag_prefix = etag_prefix
        super().__init__(base_file, dimension)
        # What can break from now on is what is written to: the build's checksum is known.
        self._blamed = changes_file or base_file
        self.shown = 0
        self.num_built = self._num_documents

    @property
    def has_changes_file(self) -> bool:
        """Whether changes are read beside the build."""
        return self._changes_file is not None

    def read_changes(self, changes_file: Path) -> None:
        """Reads changes from now on, where there was no file of them before; nobody else may do so meanwhile."""
        self._changes_file = self._blamed = changes_file
        # Every thread opens a connection anew; the old ones are closed with the store.
        self._local = threading.local()

    def __len__(self) -> int:
        with self._reading() as connection:
            hidden, written = connection.execute(
                "SELECT (SELECT count(*) FROM main.hidden),"
                " (SELECT count(*) FROM main.documents WHERE is_current = 1)"
            ).fetchone()
        return int(self.num_built - hidden + written)

    @property
    def version(self) -> int:
        """Number of the last change that is shown to searches: see DocumentStore."""
        return self.shown

    def rows(self) -> Int64Array:
        """Returns the rows of all documents: see DocumentStore."""
        return self.rows_now()[1]

    @property
    def next_row(self) -> int:
        """The first row that no document has had: see DocumentStore."""
        with self._reading() as connection:
            return int(connection.execute(_NEXT_ROW, (self.num_built,)).fetchone()[0])

    def rows_between(self, first: int, stop: int) -> Int64Array:
        """Returns the rows of the documents among these rows: see DocumentStore. Reads no document."""
        within = "row >= ?1 AND row < ?2"
        query = (
            f"SELECT row, 0 FROM main.hidden WHERE {within} UNION ALL"  # noqa: S608  (ours)
            f" SELECT row, 1 FROM main.documents WHERE is_current = 1 AND {within}"
        )
        with self._reading() as connection:
            found = connection.execute(query, (first, stop)).fetchall()
        hidden = [row for row, is_written in found if not is_written]
        written = np.asarray(sorted(row for row, is_written in found if is_written), np.int64)
        built = np.setdiff1d(np.arange(first, min(stop, self.num_built), dtype=np.int64), hidden)
        return np.concatenate([built, written])

    def rows_now(self) -> tuple[int, Int64Array]:
        """Returns the last change's number and the rows int64, ascending, of all documents at that moment."""
        with self._reading() as connection:
            connection.execute("BEGIN")
            try:
                sequence = int(connection.execute(_LAST_SEQUENCE).fetchone()[0])
                found = connection.execute("SELECT row FROM documents")
                rows = np.fromiter((row for (row,) in found), dtype=np.int64)
            finally:
                connection.execute("COMMIT")
        return sequence, np.sort(rows)

    def select(self, condition: Filter) -> Selection:
        """Returns the rows that meet the condition, of all that a search may still find: see DocumentStore.

        That is the documents' and those that later changes than the last one shown replaced: indexes may not have
        seen these yet.
        """
        clause, parameters = where_clause(condition, "metadata", self.indexed_fields)
        unindexed, values = where_clause(condition, "metadata")
        documents = f"SELECT row FROM documents WHERE {clause}"  # noqa: S608  (values are parameters)
        replaced = (
            f"SELECT row FROM versions WHERE {unindexed}"  # noqa: S608  (as above)
            " AND row IN (SELECT replaced_row FROM main.changes WHERE sequence > ?)"
        )
        shown = self.shown  # first: no index goes back
        with self._reading() as connection:
            connection.execute("BEGIN")
            try:
                next_row = int(connection.execute(_NEXT_ROW, (self.num_built,)).fetchone()[0])
                rows = np.concatenate(
                    [
                        _rows(connection.execute(documents, parameters)),
                        _rows(connection.execute(replaced, [*values, shown])),
                    ]
                )
            finally:
                connection.execute("COMMIT")

        def written_between(first: int, stop: int) -> Int64Array:
            query = f"SELECT row FROM main.documents WHERE row >= ? AND row < ? AND {unindexed} ORDER BY row"  # noqa: S608
            with self._reading() as connection:
                return _rows(connection.execute(query, [first, stop, *values]))

        return MatchingRows(np.sort(rows), next_row, written_between)

    def changes_after(self, sequence: int) -> list[LoggedChange]:
        """Returns the changes behind that number, in their order."""
        query = "SELECT sequence, row, replaced_row FROM main.changes WHERE sequence > ? ORDER BY sequence"
        with self._reading() as connection:
            return [LoggedChange(*found) for found in connection.execute(query, (sequence,))]

    def page(self, after_key: str | None, size: int) -> list[Document]:
        """Returns up to `size` documents whose keys follow `after_key`, in the order of keys."""
        where = "" if after_key is None else "WHERE key > ?"
        query = f"SELECT row, key, title, text, metadata FROM documents {where} ORDER BY key LIMIT ?"  # noqa: S608
        values: list[Any] = [size] if after_key is None else [after_key, size]
        with self._reading() as connection:
            return [self._document(found) for found in connection.execute(query, values)]

    def _document(self, found: Sequence[Any]) -> Document:
        row, key, title, text, metadata = found
        return Document(row, key, title, text, metadata, f"{self._etag_prefix}-{row:x}")

    def _count(self, table: str) -> int:
        """Counts a table of the build, whose rows are 0 … n - 1: at once, whatever its size."""
        with self._reading() as connection:
            query = f"SELECT coalesce(max(row), -1) + 1 FROM base.{table}"  # noqa: S608  (ours)
            return int(connection.execute(query).fetchone()[0])

    def _connect(self) -> LiveConnection:
        connection = open_live(self._changes_file, self._file)
        connection.execute("PRAGMA query_only=ON")
        return connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._is_outdated():
            del self._local.opened
        damage = None
        try:
            with super()._reading() as connection:
                yield connection
        except DamagedIndexError as error:
            damage = error
        if self._is_outdated():
            what = "was written to while it was read: ask again"
            raise UnreadableChangesError(self._blamed, what) from damage
        if damage is not None:
            raise damage

    def _is_outdated(self) -> bool:
        opened = getattr(self._local, "opened", None)
        return opened is not None and opened.connection.is_outdated


def _rows(found: sqlite3.Cursor) -> Int64Array:
    return np.fromiter((row for (row,) in found), dtype=np.int64)


_LAST_SEQUENCE = "SELECT coalesce(max(sequence), 0) FROM main.changes"
_NEXT_ROW = "SELECT coalesce(max(row) + 1, ?) FROM main.documents"
