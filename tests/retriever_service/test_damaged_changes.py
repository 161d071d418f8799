"""Changes that are damaged or gone from their log, and those that a reader still needs."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.corpus.base import Delete
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DamagedIndexError
from retriever_service.ingest.verify import verify_index
from retriever_service.types import SearchParameters
from tests.retriever_service.damaged_folders import change, compacted, flip, repaired

Build = Callable[..., Any]


def answered(folder: Path, request_id: str) -> None:
    live = LocalCorpus(folder)
    live.delete(Delete(request_id, "d", [("doc-9", "")]))
    live.close()


@pytest.mark.parametrize("column", ["digest", "response"])
def test_a_damaged_remembered_answer_is_refused_by_its_request_id(
    column: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """A wrong answer was given again, and of a wrong digest the caller was accused."""
    build_corpus(corpus, tmp_path / "index")
    folder = tmp_path / "index"
    answered(folder, "r-1")
    verify_index(folder, lambda what: None)
    with contextlib.closing(sqlite3.connect(folder / "live-000001.sqlite")) as connection, connection:
        assert connection.execute(f"UPDATE requests SET {column} = {column} || ' '").rowcount == 1
    for refuse in (LocalCorpus, lambda folder: verify_index(folder, lambda what: None)):
        with pytest.raises(DamagedIndexError, match=r"live-000001\.sqlite: the answer .*'r-1'"):
            refuse(folder)  # type: ignore[operator]
    live = LocalCorpus(folder, verify=False)
    try:
        with pytest.raises(DamagedIndexError, match="'r-1' is not what was written"):
            live.delete(Delete("r-1", "d", [("doc-9", "")]))
        live.delete(Delete("r-2", "d", [("doc-9", "")]))
    finally:
        live.close()


def test_answers_remembered_before_they_had_a_checksum_are_given_again(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = tmp_path / "index"
    answered(folder, "r-1")
    with contextlib.closing(sqlite3.connect(folder / "live-000001.sqlite")) as connection, connection:
        connection.execute("ALTER TABLE requests DROP COLUMN crc32")
    verify_index(folder, lambda what: None)
    live = LocalCorpus(folder)
    try:
        assert live.delete(Delete("r-1", "d", [("doc-9", "")])).deleted == 1
        assert live.delete(Delete("r-2", "d", [("doc-9", "")])).missing_keys == ["doc-9"]
    finally:
        live.close()
    verify_index(folder, lambda what: None)


def crashed(folder: Path, copy: Path) -> Path:
    """What a killed retriever leaves: a copy of the folder while it is open, three changes in the log."""
    live = LocalCorpus(folder)
    for key in ("doc-1", "doc-2", "doc-3"):
        live.delete(Delete("", "d", [(key, "")]))
    shutil.copytree(folder, copy)
    live.close()
    return copy


@pytest.mark.parametrize("damage", ["a byte of the last change", "cut", "gone"])
def test_acknowledged_changes_that_a_damaged_log_ends_before_are_missed_by_name_and_given_up_by_repair(
    damage: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """SQLite ends its write-ahead log at the damaged frame: what had been deleted was found again."""
    build_corpus(corpus, tmp_path / "index")
    folder = crashed(tmp_path / "index", tmp_path / "crashed")
    log = folder / "live-000001.sqlite-wal"
    content = bytearray(log.read_bytes())
    if damage == "gone":
        log.unlink()
    else:
        content[-100] ^= 1
        log.write_bytes(content if damage != "cut" else content[:-100])
    said = (
        r"live-000001\.sqlite: missing" if damage == "gone" else r"live-000001\.sqlite: changes 3 to 3 were"
    )
    refusals: list[Callable[[Path], Any]] = [
        LocalCorpus,
        lambda folder: LocalCorpus(folder, verify=False),
        lambda folder: LocalCorpus(folder, take_changes=False),
        lambda folder: verify_index(folder, lambda what: None),
    ]
    for refuse in refusals:
        with pytest.raises(DamagedIndexError, match=said):
            refuse(folder)
    if damage == "gone":  # with it went the tables
        return
    assert repaired(folder)
    live = LocalCorpus(folder)
    try:
        found = live.generation.store.documents_by_key(["doc-1", "doc-2", "doc-3"])
        assert set(found) == {"doc-3"}
        live.delete(Delete("", "d", [("doc-3", "")]))
        assert live.sequence == 3
    finally:
        live.close()
    assert not repaired(folder)


def test_what_a_killed_retriever_leaves_is_taken_over_whole(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = crashed(tmp_path / "index", tmp_path / "crashed")
    verify_index(folder, lambda what: None)
    live = LocalCorpus(folder)
    assert live.sequence == 3
    live.close()


def test_a_damaged_number_of_the_last_change_is_named_and_a_short_one_tells_nothing(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    file = folder / "live-000001.sqlite-acknowledged"
    flip(file)
    for refuse in (LocalCorpus, lambda folder: verify_index(folder, lambda what: None)):
        with pytest.raises(DamagedIndexError, match=r"live-000001\.sqlite-acknowledged: is not what was"):
            refuse(folder)  # type: ignore[operator]
    file.write_bytes(b"0000")
    verify_index(folder, lambda what: None)
    LocalCorpus(folder).close()
    assert file.read_bytes()[:21] == b"00000000000000000003 "


def test_a_reader_that_lags_behind_still_reads_what_a_restarted_writer_would_purge(
    tmp_path: Path, corpus: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows were gone at the writer's start, and searches of the reader failed with DATA_LOSS."""
    build_corpus(corpus, tmp_path / "index")
    folder = tmp_path / "index"
    live = LocalCorpus(folder)
    vector = change(live)
    reader = LocalCorpus(folder, take_changes=False)
    try:
        live.delete(Delete("", "d", [("fresh", "")]))
        live.close()
        for _ in range(2):
            LocalCorpus(folder).close()
        index, store = reader.generation.index, reader.generation.store
        row = int(index.search(vector * 10, 1, SearchParameters())[0][0, 0])
        assert store.documents_by_row([row], replaced=True)[row].key == "fresh"
        np.testing.assert_array_equal(store.embeddings_of([row]), vector)
        assert reader.follow()
        monkeypatch.setattr("retriever_service.corpus.local._PURGE_GRACE_S", 0.0)
        for _ in range(2):
            LocalCorpus(folder).close()
        assert not store.documents_by_row([row], replaced=True)
    finally:
        reader.close()
    verify_index(folder, lambda what: None)
