"""Opens a build and its changes as one: to write, or to read beside another process that writes.

SQLite reads a write-ahead log by way of the -shm file beside it, which it makes where it may. In a folder that
cannot be written to, both are there as long as a writer is, and what it left when it was killed. Where there is no
log, the changes file alone is all, and is read as one that never changes, until it has.
"""

import sqlite3
import time
from pathlib import Path

from retriever_service.errors import UnreadableChangesError, is_full

_ATTEMPTS = 20
_PAUSE_S = 0.05
"""A writer that starts makes, removes and makes its log again within milliseconds."""
_Stamp = tuple[int, int, int] | None


class LiveConnection(sqlite3.Connection):
    """The changes as `main`, the build as `base`, and both as one in the views that reading names."""

    frozen: tuple[Path, tuple[_Stamp, _Stamp]] | None = None
    """Where SQLite was told that nothing changes: the changes file, and what it and its log were like then."""

    @property
    def is_outdated(self) -> bool:
        """Whether another process has written since what this connection does not see."""
        return self.frozen is not None and _stamps(self.frozen[0]) != self.frozen[1]


def open_live(changes_file: Path | None, base_file: Path) -> LiveConnection:
    """Opens both; without a changes file the build alone. Raises sqlite3.Error, or UnreadableChangesError."""
    if changes_file is None:
        return _open(":memory:", base_file, SCHEMA)
    if changes_file.exists() and not _is_writable(changes_file.parent):
        return _open_to_read(changes_file, base_file)
    return _open(f"{changes_file.absolute().as_uri()}?mode=rw", base_file)


def _open_to_read(changes_file: Path, base_file: Path) -> LiveConnection:
    """Opens what cannot be written to."""
    reason = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE_S if attempt else 0)
        stamps = _stamps(changes_file)
        has_log = stamps[1] is not None
        uri = f"{changes_file.absolute().as_uri()}?{'mode=ro' if has_log else 'immutable=1'}"
        try:
            connection = _open(uri, base_file)
        except sqlite3.OperationalError as error:
            if not _is_refused(error):
                raise
            reason = str(error)
            continue
        if has_log:
            return connection
        connection.frozen = changes_file, stamps
        if not connection.is_outdated:
            return connection
        connection.close()
    raise UnreadableChangesError(
        changes_file,
        f"its changes are in {changes_file.name}-wal, which is read by way of {changes_file.name}-shm, and that"
        f" is not there or may not be read ({reason}): have a retriever that may write to the folder open it,"
        " or let this one write there",
    )


def _open(uri: str, base_file: Path, schema: str = "") -> LiveConnection:
    connection = sqlite3.connect(
        uri, uri=True, check_same_thread=False, isolation_level=None, timeout=30, factory=LiveConnection
    )
    try:
        connection.execute("ATTACH ? AS base", (f"{base_file.absolute().as_uri()}?mode=ro&immutable=1",))
        connection.executescript(schema + _VIEWS)
        connection.execute("SELECT count(*) FROM main.sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _is_refused(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))


def _stamps(changes_file: Path) -> tuple[_Stamp, _Stamp]:
    """Returns what tells a changes file, and its log unless that is empty, from another or from itself later."""
    log = _stamp(changes_file.with_name(f"{changes_file.name}-wal"))
    return _stamp(changes_file), log if log is not None and log[1] else None


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_writable(folder: Path) -> bool:
    try:
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        # A full disk can be written to, and is: only what nobody writes may be read as if it never changed.
        return is_full(error)
    return True


SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS main.documents (
    row INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT,
    is_current INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS main.current_keys ON documents (key) WHERE is_current = 1;
CREATE TABLE IF NOT EXISTS main.embeddings (row INTEGER PRIMARY KEY, embedding BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS main.checksums (row INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS main.hidden (row INTEGER PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS main.changes (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    row INTEGER,
    replaced_row INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS main.requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    response TEXT NOT NULL,
    crc32 INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS main.facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
COMMIT;
"""

_VIEWS = """
CREATE TEMP VIEW versions AS
    SELECT row, key, title, text, metadata FROM base.documents
    UNION ALL SELECT row, key, title, text, metadata FROM main.documents;
CREATE TEMP VIEW documents AS
    SELECT row, key, title, text, metadata FROM base.documents AS built
        WHERE NOT EXISTS (SELECT 1 FROM main.hidden WHERE hidden.row = built.row)
    UNION ALL SELECT row, key, title, text, metadata FROM main.documents WHERE is_current = 1;
CREATE TEMP VIEW embeddings AS
    SELECT row, embedding FROM base.embeddings UNION ALL SELECT row, embedding FROM main.embeddings;
"""
