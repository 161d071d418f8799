"""Whether a changes file is whole: SQLite's own check, an unbroken log, and what the log says is what is there."""

import sqlite3
import zlib
from contextlib import closing
from pathlib import Path

from retriever_service.errors import DamagedIndexError
from retriever_service.store.acknowledged import LostChangesError, read_acknowledged
from retriever_service.store.live_connection import open_live
from retriever_service.store.sqlite import meaning


def content_crc32(key: str, title: str, text: str, metadata: str | None, embedding: bytes) -> int:
    """Returns what is written beside a document, so that a damaged byte of it is found."""
    return _crc32(key.encode(), title.encode(), text.encode(), (metadata or "").encode(), embedding)


def answer_crc32(request_id: str, digest: str, response: str) -> int:
    """Returns what is written beside a remembered answer, so that a damaged byte of it is found."""
    return _crc32(request_id.encode(), digest.encode(), response.encode())


def _crc32(*parts: bytes) -> int:
    crc32 = 0
    for part in parts:
        crc32 = zlib.crc32(part, zlib.crc32(len(part).to_bytes(8, "little"), crc32))
    return crc32


def check_changes(
    file: Path, base_file: Path, base_digest: str, dimension: int, snapshot_sequence: int
) -> None:
    """Checks the changes of a build, wholly.

    `snapshot_sequence` is the last change that a snapshot of them holds, 0 where it holds none: then a file that
    is not there, or not begun, is that of a build that nobody has changed. Raises DamagedIndexError naming the
    file, LostChangesError, or DiskFullError.
    """
    acknowledged = read_acknowledged(file)  # first: a retriever may be writing
    begun = False
    if file.exists() and file.stat().st_size:
        try:
            with closing(open_live(file, base_file)) as connection:
                connection.executescript(_VIEWS)
                connection.execute("BEGIN")
                begun = _is_begun(connection)
                if begun:
                    _check(connection, file, base_digest, dimension, snapshot_sequence)
                    _check_end(connection, file, acknowledged)
        except sqlite3.DatabaseError as error:
            raise meaning(error, file, "read") from error
        except UnicodeDecodeError as error:
            raise DamagedIndexError(file, f"SQLite cannot read it: {error}") from error
    if not begun:
        _check_needless(file, acknowledged, is_compacted=snapshot_sequence > 0)


def check_last_change(file: Path, base_file: Path, *, is_compacted: bool) -> None:
    """Checks only that a changes file is there where it has to be, and that no acknowledged change is gone.

    `is_compacted` says that a snapshot holds changes of it. Raises as `check_changes` does.
    """
    acknowledged = read_acknowledged(file)
    if not is_begun(file, base_file):
        _check_needless(file, acknowledged, is_compacted=is_compacted)
        return
    try:
        with closing(open_live(file, base_file)) as connection:
            _check_end(connection, file, acknowledged)
    except sqlite3.DatabaseError as error:
        raise meaning(error, file, "read") from error


def _check_needless(file: Path, acknowledged: int, *, is_compacted: bool) -> None:
    if is_compacted:
        raise DamagedIndexError(file, "missing or empty, where a compaction holds changes of it")
    if acknowledged:
        raise DamagedIndexError(file, f"missing or empty, where {acknowledged} changes were acknowledged")


def _check_end(connection: sqlite3.Connection, file: Path, acknowledged: int) -> None:
    last = connection.execute("SELECT coalesce(max(sequence), 0) FROM main.changes").fetchone()[0]
    if last < acknowledged:
        raise LostChangesError(file, last, acknowledged)


def is_begun(file: Path, base_file: Path) -> bool:
    """Whether a changes file has its tables. Raises DamagedIndexError, or DiskFullError."""
    if not file.exists() or not file.stat().st_size:
        return False
    try:
        with closing(open_live(file, base_file)) as connection:
            return _is_begun(connection)
    except sqlite3.DatabaseError as error:
        raise meaning(error, file, "read") from error


def _is_begun(connection: sqlite3.Connection) -> bool:
    """A writer that was killed at its very first start leaves a file without tables, or without its build."""
    if not _has_table(connection, "facts"):
        return False
    return bool(connection.execute("SELECT count(*) FROM main.facts").fetchone()[0])


def _check(
    connection: sqlite3.Connection, file: Path, base_digest: str, dimension: int, snapshot_sequence: int
) -> None:
    answer = str(connection.execute("PRAGMA main.integrity_check(1)").fetchone()[0])
    if answer != "ok":
        raise DamagedIndexError(file, answer)
    facts = dict(connection.execute("SELECT name, value FROM main.facts"))
    if facts.get("base") != base_digest:
        raise DamagedIndexError(file, "holds the changes of another build")
    count, first, last = connection.execute(
        "SELECT count(*), coalesce(min(sequence), 1), coalesce(max(sequence), 0) FROM main.changes"
    ).fetchone()
    given = connection.execute("SELECT seq FROM main.sqlite_sequence WHERE name = 'changes'").fetchone()
    if (first, last) != (1, count) or (0 if given is None else given[0]) != last:
        raise DamagedIndexError(
            file, f"its log holds {count} changes from {first} to {last}: some are missing"
        )
    if last < snapshot_sequence:
        raise DamagedIndexError(
            file, f"its log ends at {last}, a snapshot holds changes up to {snapshot_sequence}"
        )
    highest = connection.execute("SELECT coalesce(max(row), -1) FROM main.changes").fetchone()[0]
    if not facts.get("next_row", "").isdecimal() or int(facts["next_row"]) <= highest:
        raise DamagedIndexError(file, f"gives row {facts.get('next_row')!r} again")
    _check_documents(connection, file, dimension)


def _check_documents(connection: sqlite3.Connection, file: Path, dimension: int) -> None:
    for query, what in _CONTRADICTIONS.items():
        found = connection.execute(query, {"embedding_bytes": 4 * dimension}).fetchone()
        if found is not None:
            raise DamagedIndexError(file, f"row {found[0]} {what}")
    # Before there were checksums, changes were written without.
    for row, crc32, *content in connection.execute(_CONTENTS) if _has_table(connection, "checksums") else ():
        if content_crc32(*content) != crc32:
            raise DamagedIndexError(file, f"row {row} is not what was written")
    _check_answers(connection, file)


def _check_answers(connection: sqlite3.Connection, file: Path) -> None:
    if not has_column(connection, "requests", "crc32"):
        return  # written before there was one
    for crc32, *answer in connection.execute(
        "SELECT crc32, request_id, digest, response FROM main.requests WHERE crc32 IS NOT NULL"
    ):
        if answer_crc32(*answer) != crc32:
            raise damaged_answer(file, answer[0])


def damaged_answer(file: Path, request_id: str) -> DamagedIndexError:
    """Returns what is raised for a remembered answer whose checksum differs."""
    return DamagedIndexError(
        file, f"the answer remembered for request_id {request_id!r} is not what was written"
    )


def has_column(connection: sqlite3.Connection, table: str, name: str) -> bool:
    """Whether a table of the changes has a column."""
    query = "SELECT count(*) FROM pragma_table_info(?, 'main') WHERE name = ?"
    return bool(connection.execute(query, (table, name)).fetchone()[0])


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    query = "SELECT count(*) FROM main.sqlite_schema WHERE name = ?"
    return bool(connection.execute(query, (name,)).fetchone()[0])


# What the tables hold, and what they must hold by the log.
_VIEWS = """
CREATE TEMP VIEW living AS SELECT row FROM main.documents WHERE is_current = 1;
CREATE TEMP VIEW living_by_log AS
    SELECT row FROM main.changes WHERE row IS NOT NULL
    EXCEPT SELECT replaced_row FROM main.changes WHERE replaced_row IS NOT NULL;
CREATE TEMP VIEW hidden_by_log AS
    SELECT replaced_row AS row FROM main.changes WHERE replaced_row IS NOT NULL
    EXCEPT SELECT row FROM main.changes WHERE row IS NOT NULL;
CREATE TEMP VIEW renamed AS
    SELECT documents.row FROM main.changes JOIN main.documents USING (row) WHERE changes.key <> documents.key;
CREATE TEMP VIEW sized AS
    SELECT documents.row, length(embedding) AS size_bytes
    FROM main.documents LEFT JOIN main.embeddings USING (row);
"""
# Each finds rows that contradict each other, and says what they are.
_CONTRADICTIONS = {
    "SELECT row FROM living EXCEPT SELECT row FROM living_by_log": "is there, and its log does not have it",
    "SELECT row FROM living_by_log EXCEPT SELECT row FROM living": "is in its log, and not there",
    "SELECT row FROM main.hidden EXCEPT SELECT row FROM hidden_by_log": "is hidden, and not by its log",
    "SELECT row FROM hidden_by_log EXCEPT SELECT row FROM main.hidden": "is replaced by its log, and not hidden",
    "SELECT row FROM main.hidden EXCEPT SELECT row FROM base.documents": "is hidden, and not in the build",
    "SELECT row FROM renamed": "has another key than in its log",
    "SELECT row FROM sized WHERE size_bytes IS NOT :embedding_bytes": "has no embedding of the index's dimension",
}
_CONTENTS = """
    SELECT documents.row, crc32, key, title, text, metadata, embedding
    FROM main.documents JOIN main.embeddings USING (row) JOIN main.checksums USING (row)
"""
