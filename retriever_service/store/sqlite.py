"""Documents and exact float32 embeddings in one SQLite file."""

import contextlib
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_serving.errors import DataLossError, RagError
from retriever_service.errors import DamagedIndexError, DiskFullError
from retriever_service.filters import Filter
from retriever_service.store.base import DocumentStore
from retriever_service.store.filter_indexes import create_filter_indexes, indexed_fields
from retriever_service.store.filter_sql import where_clause
from retriever_service.types import Document, Float32Array, Int64Array

_VALUES_PER_QUERY = 1000
# What SQLite says of a full disk: also where a file's memory map, or the shared memory of its log, has no room.
_FULL = {"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMMAP"}
# Where "file change counter" and "version valid for" stand: https://www.sqlite.org/fileformat2.html
_CHANGE_COUNTERS = (24, 92)
# Stored embeddings are float32, or float16 where a build was asked for it; their length in bytes tells.
EMBEDDING_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class _ThreadConnection:
    """A thread's connection: closed when the thread has ended, for nothing else refers to this then."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


class SqliteStore(DocumentStore):
    """Reads a finished store: one read-only connection for each thread, as long as the thread lives."""

    _schema = "main"
    """What a connection calls the file."""

    def __init__(self, file: Path, dimension: int) -> None:
        """Opens the store. Raises DamagedIndexError naming a file that is not one."""
        self._file = file
        self._blamed = file
        self._dimension = dimension
        self._local = threading.local()
        self._connections: weakref.WeakSet[_ThreadConnection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._num_documents = self._count("documents")
        num_embeddings = self._count("embeddings")
        with self._reading() as connection:
            self.indexed_fields = indexed_fields(connection, self._schema)
        if num_embeddings != self._num_documents:
            raise DamagedIndexError(file, f"{num_embeddings} embeddings for {self._num_documents} documents")

    def __len__(self) -> int:
        return self._num_documents

    def documents_by_row(self, rows: Sequence[int], *, replaced: bool = False) -> Mapping[int, Document]:
        """Returns the documents of those rows that exist: see DocumentStore."""
        table = "versions" if replaced else "documents"
        query = f"SELECT row, key, title, text, metadata FROM {table} WHERE row IN"  # noqa: S608  (one of two)
        return {found[0]: self._document(found) for found in self._select(query, rows)}

    def documents_by_key(self, keys: Sequence[str]) -> Mapping[str, Document]:
        """Returns the documents of those keys that exist: see DocumentStore."""
        query = "SELECT row, key, title, text, metadata FROM documents WHERE key IN"
        return {found[1]: self._document(found) for found in self._select(query, keys)}

    def embeddings_of(self, rows: Sequence[int]) -> Float32Array:
        """Returns float32 [len(rows), dimension], in the order asked: see DocumentStore."""
        found = dict(self._select("SELECT row, embedding FROM embeddings WHERE row IN", rows))
        dtypes = {self._dimension * dtype.itemsize: dtype for dtype in EMBEDDING_DTYPES.values()}
        blobs: list[bytes] = []
        for row in rows:
            blobs.append(found.get(row, b""))
            if len(blobs[-1]) not in dtypes:
                raise DataLossError(
                    f"{self._file}: row {row} has no embedding of dimension {self._dimension}"
                )
        embeddings = np.empty((len(rows), self._dimension), dtype=np.float32)
        # All of one dtype at once: a compaction reads every row, and searches wait for the interpreter's lock.
        for size, dtype in dtypes.items():
            places = [place for place, blob in enumerate(blobs) if len(blob) == size]
            if places:
                joined = np.frombuffer(b"".join(blobs[place] for place in places), dtype=dtype)
                embeddings[places] = joined.reshape(-1, self._dimension)
        return embeddings

    def embeddings_in_chunks(self, rows: Int64Array, size: int) -> Iterator[Float32Array]:
        """Yields the embeddings of rows int64, float32 [at most size, dimension] at a time."""
        for start in range(0, len(rows), size):
            yield self.embeddings_of(rows[start : start + size].tolist())

    def many_embeddings(self, rows: Int64Array, size: int) -> Float32Array:
        """Returns those of rows int64, read in chunks: as SQLite gives them they take as much memory again."""
        embeddings = np.empty((len(rows), self._dimension), dtype=np.float32)
        for number, chunk in enumerate(self.embeddings_in_chunks(rows, size)):
            embeddings[number * size : number * size + len(chunk)] = chunk
        return embeddings

    def rows(self) -> Int64Array:
        """Returns the rows of all documents: see DocumentStore."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def next_row(self) -> int:
        """The first row that no document has had: see DocumentStore."""
        return self._num_documents

    def rows_between(self, first: int, stop: int) -> Int64Array:
        """Returns the rows of the documents among these rows: see DocumentStore."""
        return np.arange(first, min(stop, len(self)), dtype=np.int64)

    def rows_where(self, condition: Filter) -> Int64Array:
        """Returns the rows whose metadata meet the condition: see DocumentStore."""
        clause, parameters = where_clause(condition, "metadata", self.indexed_fields)
        # Sorted here: ORDER BY would tempt SQLite to read every document, in the order of rows, past an index.
        query = f"SELECT row FROM documents WHERE {clause}"  # noqa: S608  (values are parameters)
        with self._reading() as connection:
            found = np.fromiter((row for (row,) in connection.execute(query, parameters)), dtype=np.int64)
        return np.sort(found)

    def embedding_chunks(self, rows_per_chunk: int, first_row: int = 0) -> Iterator[Float32Array]:
        """Yields the embeddings from first_row on, float32 [at most rows_per_chunk, dimension] at a time."""
        for start in range(first_row, len(self), rows_per_chunk):
            yield self.embeddings_of(range(start, min(start + rows_per_chunk, len(self))))

    def check(self) -> None:
        """Lets SQLite check the whole file. Raises DamagedIndexError naming it."""
        with self._reading() as connection:
            answer = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        if answer != "ok":
            raise DamagedIndexError(self._file, answer)

    def close(self) -> None:
        """Closes the connections of all threads."""
        with self._lock:
            for opened in self._connections:
                opened.connection.close()
            self._connections.clear()

    def _select(self, query: str, values: Sequence[int] | Sequence[str]) -> Iterator[Any]:
        distinct = list(dict.fromkeys(values))
        with self._reading() as connection:
            for start in range(0, len(distinct), _VALUES_PER_QUERY):
                chunk = distinct[start : start + _VALUES_PER_QUERY]
                yield from connection.execute(f"{query} ({','.join('?' * len(chunk))})", chunk)

    def _count(self, table: str) -> int:
        with self._reading() as connection:
            return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  (ours)

    def _document(self, found: Sequence[Any]) -> Document:
        return Document(*found)

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self._file.absolute().as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        connection.execute("CREATE TEMP VIEW versions AS SELECT * FROM main.documents")
        return connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            # Held here too, lest a store that turns to other files closes it under this read.
            opened: _ThreadConnection | None = getattr(self._local, "opened", None)
            if opened is None:
                opened = _ThreadConnection(self._connect())
                self._local.opened = opened
                with self._lock:
                    self._connections.add(opened)
            yield opened.connection
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.DatabaseError):
                raise meaning(error, self._blamed, "read") from error
            raise DamagedIndexError(self._blamed, f"SQLite cannot read it: {error}") from error


class SqliteWriter:
    """Writes a store, from row 0 on or from where a killed writer came to; only `finish` makes it whole."""

    def __init__(self, file: Path, embeddings_dtype: str = "float32") -> None:
        """`embeddings_dtype` is float32 or float16. Raises sqlite3.Error where the file is no store."""
        self._file = file
        self._dtype = EMBEDDING_DTYPES[embeddings_dtype]
        self._connection = sqlite3.connect(file, isolation_level=None)
        self._connection.executescript(_SCHEMA)
        found = self._connection.execute("SELECT count(*) FROM documents").fetchone()
        self._num_documents = int(found[0])

    def __len__(self) -> int:
        return self._num_documents

    @property
    def dimension(self) -> int | None:
        """Numbers in a stored embedding; None before the first."""
        return _dimension(self._connection, self._dtype)

    def append(
        self,
        documents: Sequence[tuple[str, str, str, str | None]],
        embeddings: Float32Array,
    ) -> None:
        """Appends (key, title, text, metadata as JSON or None) with embeddings float32 [len, dim], at once.

        Raises DuplicateKeyError, and writes nothing, where a key is already there.
        """
        first = self._num_documents
        rows = range(first, first + len(documents))
        blobs = embeddings.astype(self._dtype, copy=False)
        self._connection.execute("BEGIN")
        try:
            for row, (key, title, text, metadata) in zip(rows, documents, strict=True):
                self._insert(row, key, title, text, metadata)
            self._connection.executemany(
                "INSERT INTO embeddings VALUES (?, ?)",
                ((row, blob.tobytes()) for row, blob in zip(rows, blobs, strict=True)),
            )
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        self._num_documents += len(documents)

    def finish(self, filter_indexes: Sequence[str] = ()) -> None:
        """Indexes these fields of the metadata, folds the write-ahead log into the one file and closes it."""
        create_filter_indexes(self._connection, "main", filter_indexes)
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.execute("PRAGMA journal_mode=DELETE")
        self.close()
        with self._file.open("r+b") as stream:
            # The header counts the connections that wrote: a killed build has more, and else the same bytes.
            for offset in _CHANGE_COUNTERS:
                stream.seek(offset)
                stream.write((1).to_bytes(4, "big"))

    def close(self) -> None:
        """Closes the connection; an unfinished store stays unfinished."""
        self._connection.close()

    def _insert(self, row: int, key: str, title: str, text: str, metadata: str | None) -> None:
        try:
            self._connection.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?)", (row, key, title, text, metadata)
            )
        except sqlite3.IntegrityError as error:
            found = self._connection.execute("SELECT row FROM documents WHERE key = ?", (key,)).fetchone()
            if found is None:
                raise
            raise DuplicateKeyError(key, first_row=int(found[0]), second_row=row) from error


def meaning(error: sqlite3.DatabaseError, file: Path, verb: str) -> RagError:
    """Returns what SQLite's error is to us: DiskFullError, or else DamagedIndexError; `verb` is what failed."""
    if getattr(error, "sqlite_errorname", "") in _FULL:
        return DiskFullError(f"{file}: no room on the disk: {error}", retry_after_s=5.0)
    return DamagedIndexError(file, f"SQLite cannot {verb} it: {error}")


def stored_dimension(file: Path, embeddings_dtype: str) -> int:
    """Returns how many numbers the embeddings of a finished store have. Raises DamagedIndexError."""
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            dimension = _dimension(connection, EMBEDDING_DTYPES[embeddings_dtype])
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(file, f"SQLite cannot read it: {error}") from error
    if dimension is None:
        raise DamagedIndexError(file, "holds no embedding")
    return dimension


def _dimension(connection: sqlite3.Connection, dtype: np.dtype[Any]) -> int | None:
    found = connection.execute("SELECT length(embedding) FROM embeddings LIMIT 1").fetchone()
    return None if found is None else int(found[0]) // dtype.itemsize


class DuplicateKeyError(Exception):
    """A key given to two documents; rows count from 0 in the order of writing."""

    def __init__(self, key: str, first_row: int, second_row: int) -> None:
        super().__init__(f"key {key!r} of row {second_row} is already row {first_row}'s")
        self.key = key
        self.first_row = first_row
        self.second_row = second_row


_SCHEMA = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS documents (
    row INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS embeddings (
    row INTEGER PRIMARY KEY,
    embedding BLOB NOT NULL
) STRICT;
"""
