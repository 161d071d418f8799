"""Writes changes of the corpus: one transaction a batch, durable when it returns."""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.errors import (
    DamagedIndexError,
    EtagError,
    KeyExistsError,
    RequestIdReusedError,
)
from retriever_service.store.acknowledged import Acknowledged
from retriever_service.store.filter_indexes import create_filter_indexes, indexed_fields
from retriever_service.store.live import LoggedChange
from retriever_service.store.live_check import answer_crc32, content_crc32, damaged_answer, has_column
from retriever_service.store.live_connection import SCHEMA, open_live
from retriever_service.store.sqlite import meaning
from retriever_service.types import Float32Array

_PURGE_AT = re.compile(r"(\d+) (\d+)")
"""When a writer started, in seconds since the epoch, and the log's last change then."""


class ChangeWriter:
    """The one writer of a changes file; its methods may be called from many threads, one at a time runs."""

    def __init__(
        self, changes_file: Path, base_file: Path, base_digest: str, etag_prefix: str, requests_kept: int
    ) -> None:
        """Makes the file where there is none. Raises DamagedIndexError, or DiskFullError."""
        self._file = changes_file
        self._etag_prefix = etag_prefix
        self._requests_kept = requests_kept
        self._lock = threading.Lock()
        try:
            with sqlite3.connect(changes_file, isolation_level=None) as making:
                making.execute("PRAGMA journal_mode=WAL")
                making.executescript(SCHEMA)
            making.close()
            self._connection = open_live(changes_file, base_file)
            self._connection.execute("PRAGMA synchronous=FULL")
            if not has_column(self._connection, "requests", "crc32"):
                self._connection.execute("ALTER TABLE main.requests ADD COLUMN crc32 INTEGER")
            self._adopt(base_digest)
            create_filter_indexes(self._connection, "main", indexed_fields(self._connection, "base"))
        except sqlite3.DatabaseError as error:
            raise meaning(error, changes_file, "write") from error
        self._acknowledged = Acknowledged(changes_file)
        self._acknowledged.write(self._last_sequence())

    def close(self) -> None:
        """Folds the write-ahead log in and closes."""
        self._connection.close()
        self._acknowledged.close()

    def upsert(
        self,
        request: tuple[str, str],
        documents: Sequence[tuple[str, str, str, str | None, str]],
        embeddings: Float32Array,
        *,
        create_only: bool,
    ) -> tuple[dict[str, Any], list[LoggedChange]]:
        """Writes (key, title, text, metadata, etag) with embeddings float32 [documents, dim].

        Returns what is to be answered and the changes, none where `request` (id, digest) was answered before.
        Raises as Corpus.upsert does.
        """

        def write() -> tuple[dict[str, Any], list[LoggedChange]]:
            changes: list[LoggedChange] = []
            rows: list[int] = []
            next_row = int(self._fact("next_row"))
            for document, embedding in zip(documents, embeddings, strict=True):
                key, title, text, metadata, etag = document
                replaced = self._current_row(key)
                self._check_etag(key, etag, replaced)
                if create_only and replaced is not None:
                    raise KeyExistsError(key)
                self._hide(replaced)
                rows.append(next_row)
                self._connection.execute(
                    "INSERT INTO main.documents VALUES (?, ?, ?, ?, ?, 1)",
                    (next_row, key, title, text, metadata),
                )
                blob = embedding.astype(np.dtype("<f4"), copy=False).tobytes()
                self._connection.execute("INSERT INTO main.embeddings VALUES (?, ?)", (next_row, blob))
                self._connection.execute(
                    "INSERT INTO main.checksums VALUES (?, ?)",
                    (next_row, content_crc32(key, title, text, metadata, blob)),
                )
                changes.append(self._log(key, next_row, replaced))
                next_row += 1
            self._set_fact("next_row", str(next_row))
            replaced_count = sum(change.replaced_row is not None for change in changes)
            answer = {
                "rows": rows,
                "etags": [f"{self._etag_prefix}-{row:x}" for row in rows],
                "created": len(changes) - replaced_count,
                "replaced": replaced_count,
                "sequence": changes[-1].sequence,
            }
            return answer, changes

        return self._transaction(request, write)

    def delete(
        self, request: tuple[str, str], references: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, Any], list[LoggedChange]]:
        """Deletes (key, etag or ""). Returns and raises as `upsert` does."""

        def write() -> tuple[dict[str, Any], list[LoggedChange]]:
            changes: list[LoggedChange] = []
            missing: list[str] = []
            for key, etag in references:
                row = self._current_row(key)
                self._check_etag(key, etag, row)
                if row is None:
                    missing.append(key)
                    continue
                self._hide(row)
                changes.append(self._log(key, None, row))
            sequence = changes[-1].sequence if changes else self._last_sequence()
            return {"deleted": len(changes), "missing_keys": missing, "sequence": sequence}, changes

        return self._transaction(request, write)

    def purge(self, *, grace_s: float) -> None:
        """Forgets the versions written here that were replaced or deleted before a start `grace_s` ago or earlier.

        Another process that reads this file sees a change a moment later: what it finds until then, it still
        reads. A time is noted with the log's end, and used once it is old enough; then a new one is.
        """
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                noted = _PURGE_AT.fullmatch(self._fact("purge_at"))
                now_s = int(time.time())
                if noted is not None and now_s - int(noted[1]) >= grace_s:
                    self._forget_replaced(int(noted[2]))
                    noted = None
                if noted is None or int(noted[1]) > now_s:
                    self._set_fact("purge_at", f"{now_s} {self._last_sequence()}")
        except sqlite3.DatabaseError as error:
            raise meaning(error, self._file, "write") from error

    def _forget_replaced(self, sequence: int) -> None:
        self._connection.execute(
            "CREATE TEMP TABLE forgotten AS SELECT row FROM main.documents WHERE is_current = 0 AND row IN"
            " (SELECT replaced_row FROM main.changes WHERE sequence <= ?)",
            (sequence,),
        )
        for table in ("embeddings", "checksums", "documents"):
            self._connection.execute(
                f"DELETE FROM main.{table} WHERE row IN (SELECT row FROM temp.forgotten)"  # noqa: S608  (ours)
            )
        self._connection.execute("DROP TABLE temp.forgotten")

    def _transaction(
        self, request: tuple[str, str], write: Callable[[], tuple[dict[str, Any], list[LoggedChange]]]
    ) -> tuple[dict[str, Any], list[LoggedChange]]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    answered = self._answered(*request)
                    if answered is not None:
                        self._connection.execute("ROLLBACK")
                        return answered, []
                    answer, changes = write()
                    self._remember(*request, answer)
                    self._connection.execute("COMMIT")
                    if changes:
                        self._acknowledged.write(changes[-1].sequence)
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.DatabaseError as error:
                raise meaning(error, self._file, "write") from error
            return answer, changes

    def _answered(self, request_id: str, digest: str) -> dict[str, Any] | None:
        if not request_id:
            return None
        found = self._connection.execute(
            "SELECT digest, response, crc32 FROM main.requests WHERE request_id = ?", (request_id,)
        ).fetchone()
        if found is None:
            return None
        if found[2] not in {None, answer_crc32(request_id, found[0], found[1])}:
            raise damaged_answer(self._file, request_id)
        if found[0] != digest:
            raise RequestIdReusedError(request_id)
        answer: dict[str, Any] = json.loads(found[1])
        return answer

    def _remember(self, request_id: str, digest: str, answer: dict[str, Any]) -> None:
        if not request_id:
            return
        response = json.dumps(answer)
        cursor = self._connection.execute(
            "INSERT INTO main.requests (request_id, digest, response, crc32) VALUES (?, ?, ?, ?)",
            (request_id, digest, response, answer_crc32(request_id, digest, response)),
        )
        self._connection.execute(
            "DELETE FROM main.requests WHERE number <= ?", ((cursor.lastrowid or 0) - self._requests_kept,)
        )

    def _current_row(self, key: str) -> int | None:
        found = self._connection.execute("SELECT row FROM documents WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def _check_etag(self, key: str, etag: str, row: int | None) -> None:
        stored = None if row is None else f"{self._etag_prefix}-{row:x}"
        if etag and etag != stored:
            raise EtagError(key, etag, stored)

    def _hide(self, row: int | None) -> None:
        if row is None:
            return
        written = self._connection.execute(
            "UPDATE main.documents SET is_current = 0 WHERE row = ?", (row,)
        ).rowcount
        if not written:
            self._connection.execute("INSERT INTO main.hidden VALUES (?)", (row,))

    def _log(self, key: str, row: int | None, replaced_row: int | None) -> LoggedChange:
        cursor = self._connection.execute(
            "INSERT INTO main.changes (key, row, replaced_row) VALUES (?, ?, ?)", (key, row, replaced_row)
        )
        return LoggedChange(int(cursor.lastrowid or 0), row, replaced_row)

    def _last_sequence(self) -> int:
        return int(self._connection.execute("SELECT coalesce(max(sequence), 0) FROM changes").fetchone()[0])

    def _adopt(self, base_digest: str) -> None:
        """Binds a new file to its build, and refuses one that belongs to another."""
        found = self._connection.execute("SELECT value FROM main.facts WHERE name = 'base'").fetchone()
        if found is None:
            highest = self._connection.execute("SELECT coalesce(max(row), -1) FROM base.documents").fetchone()
            self._connection.execute("BEGIN IMMEDIATE")
            self._set_fact("next_row", str(int(highest[0]) + 1))
            self._set_fact("base", base_digest)
            self._connection.execute("COMMIT")
        elif found[0] != base_digest:
            raise DamagedIndexError(self._file, "holds the changes of another build")

    def _fact(self, name: str, default: str = "") -> str:
        found = self._connection.execute("SELECT value FROM main.facts WHERE name = ?", (name,)).fetchone()
        return default if found is None else str(found[0])

    def _set_fact(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO main.facts VALUES (?, ?)", (name, value))
