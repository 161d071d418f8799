"""`rag-index repair`: a damaged snapshot comes back from SQLite, with every change since it was written."""

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retriever_service.corpus.base import Delete
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DamagedIndexError, MissingIndexError, ReadOnlyError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.verify import verify_index
from retriever_service.store.live_connection import SCHEMA
from retriever_service.types import SearchParameters
from tests.retriever_service.damaged_folders import change, compacted, flip, repaired

Build = Callable[..., Any]


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_index_is_refused_by_name_and_built_anew(
    is_compacted: bool, damage: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    folder = tmp_path / "index"
    build_corpus(corpus, folder, kind="HNSW8")
    live = LocalCorpus(folder)
    vector = change(live)
    if is_compacted:
        live.compact(lambda *_: None, threading.Event())
    live.close()
    for file in folder.glob("generation-*/index.faiss"):
        if damage == "flipped":
            flip(file)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        else:
            file.unlink()
    with pytest.raises(DamagedIndexError, match=r"index\.faiss"):
        LocalCorpus(folder)
    assert repaired(folder)
    verify_index(folder, lambda what: None)
    live = LocalCorpus(folder)
    try:
        index, store = live.generation.index, live.generation.store
        assert live.generation.manifest.kind == "HNSW8"
        assert len(store) == index.ntotal == 60
        rows, _ = index.search(vector * 10, 3, SearchParameters())
        assert store.documents_by_row([int(rows[0, 0])])[int(rows[0, 0])].key == "fresh"
        assert not store.documents_by_key(["doc-3"])
        change(live)
        live.compact(lambda *_: None, threading.Event())
    finally:
        live.close()
    assert not repaired(folder)


def test_an_index_that_nobody_has_changed_is_repaired_and_serves(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """What repair had written was refused for want of a changes file, by every command and for good."""
    folder = tmp_path / "index"
    flip(build_corpus(corpus, folder, kind="IVF10,Flat").index_file)
    assert repaired(folder)
    verify_index(folder, lambda what: None)
    assert not repaired(folder)
    for options in ({"verify": False}, {"take_changes": False}, {}):
        LocalCorpus(folder, **options).close()  # type: ignore[arg-type]
    live = LocalCorpus(folder)
    change(live)
    live.close()
    verify_index(folder, lambda what: None)


@pytest.mark.parametrize("damaged", ["index.faiss", "rows.npy"])
def test_repair_keeps_the_nprobe_that_an_index_was_built_with(
    damaged: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """It was 16 again."""
    folder = tmp_path / "index"
    build_corpus(corpus, folder, kind="IVF30,Flat", nprobe=30)
    compacted(folder)
    flip(folder / "generation-000002" / damaged)
    assert repaired(folder, nprobe=None)
    assert own_nprobe(folder) == 30
    for nprobe in (7, None):
        flip(Snapshot.open(folder).index_file)
        assert repaired(folder, nprobe=nprobe)
        assert own_nprobe(folder) == 7


def own_nprobe(folder: Path) -> int:
    return FaissIndex.load(Snapshot.open(folder).index_file).settings()["nprobe"]


# Where each file of a folder lies, whether repair can make it anew, and how it is named.
FILES = {
    "generation-000002/index.faiss": True,
    "generation-000002/rows.npy": True,
    "generation-000002/manifest.json": False,
    "generation-000001/documents.sqlite": False,
    "generation-000001/manifest.json": False,
    "live-000001.sqlite": False,
    "CURRENT": False,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_each_file_of_a_snapshot_is_refused_by_name_and_repaired_where_it_is_derived(
    name: str, damage: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    if damage == "flipped":
        flip(folder / name)
    else:
        (folder / name).unlink()
    # Without CURRENT there is no index at all, and a manifest that is gone leaves CURRENT pointing nowhere.
    named = {"CURRENT": "index", "generation-000002/manifest.json": "CURRENT|manifest"}
    refused = pytest.raises((DamagedIndexError, MissingIndexError), match=named.get(name, Path(name).name))
    with refused:
        LocalCorpus(folder)
    with refused:
        verify_index(folder, lambda what: None)
    if FILES[name]:
        assert repaired(folder)
        verify_index(folder, lambda what: None)
        live = LocalCorpus(folder)
        assert len(live.generation.store) == live.generation.index.ntotal == 59
        live.close()
    else:
        with refused:
            repaired(folder)


def test_any_damaged_byte_of_a_changed_document_is_refused(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """SQLite's own check does not read what a document says."""
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    file = folder / "live-000001.sqlite"
    whole = file.read_bytes()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        (embedding,) = connection.execute("SELECT embedding FROM embeddings").fetchone()
    for content in (b"a text of its own", embedding, b"fresh"):
        assert content in whole
        place = whole.index(content) + len(content) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for refuse in (LocalCorpus, repaired, lambda folder: verify_index(folder, lambda what: None)):
            with pytest.raises(DamagedIndexError, match=r"live-000001\.sqlite"):
                refuse(folder)  # type: ignore[operator]


BREAKS = {
    "a change is missing": "DELETE FROM changes WHERE sequence = 1",
    "the last change is missing": "DELETE FROM changes WHERE sequence = (SELECT max(sequence) FROM changes)",
    "a change says another document": "UPDATE changes SET key = 'other' WHERE row IS NOT NULL",
    "a change says another row": "UPDATE changes SET replaced_row = 7 WHERE replaced_row = 3",
    "what is deleted is back": "DELETE FROM hidden WHERE row = 3",
    "what is written is gone": "UPDATE documents SET is_current = 0",
    "an embedding is gone": "DELETE FROM embeddings",
    "an embedding is cut": "UPDATE embeddings SET embedding = x'00'",
    "rows are given again": "UPDATE facts SET value = '60' WHERE name = 'next_row'",
    "it is another build's": "UPDATE facts SET value = 'sha256:0' WHERE name = 'base'",
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_change_log_that_contradicts_itself_is_refused(
    broken: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    verify_index(folder, lambda what: None)
    with contextlib.closing(sqlite3.connect(folder / "live-000001.sqlite")) as connection, connection:
        assert connection.execute(BREAKS[broken]).rowcount > 0
    for refuse in (LocalCorpus, repaired, lambda folder: verify_index(folder, lambda what: None)):
        with pytest.raises(DamagedIndexError, match=r"live-000001\.sqlite"):
            refuse(folder)  # type: ignore[operator]


def test_changes_that_are_gone_are_missed_also_where_nothing_is_verified(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """Without them a compaction was served, and what had been deleted was listed again."""
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    (folder / "live-000001.sqlite").unlink()
    for options in ({"verify": False}, {"take_changes": False}, {}):
        with pytest.raises(DamagedIndexError, match=r"live-000001\.sqlite: missing"):
            LocalCorpus(folder, **options)  # type: ignore[arg-type]


def test_a_changes_file_that_was_not_begun_is_none(tmp_path: Path, corpus: Path, build_corpus: Build) -> None:
    """A retriever that is killed at its very first start leaves such a file."""
    build_corpus(corpus, tmp_path / "index")
    folder = tmp_path / "index"
    file = folder / "live-000001.sqlite"
    for begin in ("", "PRAGMA journal_mode=WAL", SCHEMA):
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.executescript(begin)
        verify_index(folder, lambda what: None)
        LocalCorpus(folder, take_changes=False).close()
    LocalCorpus(folder).close()
    verify_index(folder, lambda what: None)


def test_changes_of_before_there_were_checksums_are_taken_over(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index")
    folder = compacted(tmp_path / "index")
    with contextlib.closing(sqlite3.connect(folder / "live-000001.sqlite")) as connection, connection:
        connection.execute("DROP TABLE checksums")
    verify_index(folder, lambda what: None)
    live = LocalCorpus(folder)
    change(live)
    live.close()
    verify_index(folder, lambda what: None)


def test_a_backup_is_taken_beside_a_running_retriever(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """As docs/operations.md says: snapshots first, then the changes."""
    build_corpus(corpus, tmp_path / "index")
    folder, backup = compacted(tmp_path / "index"), tmp_path / "backup"
    live = LocalCorpus(folder)
    shutil.copytree(folder, backup, ignore=shutil.ignore_patterns("live-*", ".*"))
    live.delete(Delete("", "d", [("doc-7", "")]))
    live.compact(lambda *_: None, threading.Event())
    name = "live-000001.sqlite"
    with (
        contextlib.closing(sqlite3.connect(folder / name)) as source,
        contextlib.closing(sqlite3.connect(backup / name)) as copy,
    ):
        source.backup(copy)
    live.close()
    verify_index(backup, lambda what: None)
    restored = LocalCorpus(backup)
    assert len(restored.generation.store) == restored.generation.index.ntotal == 58
    assert not restored.generation.store.documents_by_key(["doc-7"])
    change(restored)
    restored.close()


def test_nothing_is_repaired_under_a_retriever_that_writes(
    tmp_path: Path, corpus: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(root: Path) -> None:
        raise ReadOnlyError(f"another retriever writes to {root}")

    folder = tmp_path / "index"
    flip(build_corpus(corpus, folder).index_file)
    monkeypatch.setattr("retriever_service.corpus.lock.acquire", taken)
    with pytest.raises(ReadOnlyError):
        repaired(folder)
