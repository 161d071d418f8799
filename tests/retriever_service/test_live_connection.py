"""A retriever in a folder that it cannot write to reads what the one that writes there has written."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import UnreadableChangesError
from retriever_service.index.snapshot import live_file
from retriever_service.store import changes, live_connection
from retriever_service.types import SearchParameters

DIM = 16
NOBODY = 65534


def vector(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((1, DIM)).astype(np.float32)


def upsert(writer: LocalCorpus, key: str, seed: int) -> None:
    embedding = writer.generation.manifest.embedding
    writer.upsert(Upsert("", "", [NewDocument(key, "", "t")], vector(seed), False, embedding))


def nearest(reader: LocalCorpus, seed: int) -> str:
    generation = reader.generation
    rows, _ = generation.index.search(vector(seed) * 10, 1, SearchParameters())
    return generation.store.documents_by_row(rows[0].tolist())[int(rows[0, 0])].key


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[LocalCorpus]:
    with contextlib.closing(LocalCorpus(folder)) as writer:
        yield writer


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[LocalCorpus]:
    with contextlib.closing(LocalCorpus(folder, take_changes=False)) as reader:
        yield reader


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only reads may not write to the folder; the writer may."""

    def open_to_write(changes_file: Path, base_file: Path) -> live_connection.LiveConnection:
        return live_connection._open(f"{changes_file.as_uri()}?mode=rw", base_file)

    monkeypatch.setattr(live_connection, "_is_writable", lambda folder: False)
    monkeypatch.setattr(changes, "open_live", open_to_write)


@pytest.mark.usefixtures("only_read")
def test_a_folder_that_cannot_be_written_to_is_followed(folder: Path) -> None:
    """Its changes file was read as one that nobody can be writing: without the log, and never again."""
    with opened(folder) as writer:
        upsert(writer, "first", 1)
    with reading(folder) as reader:
        assert nearest(reader, 1) == "first"
        with opened(folder) as writer:
            assert not reader.follow()
            upsert(writer, "second", 2)
            assert reader.follow()
            assert nearest(reader, 2) == "second"
            with reading(folder) as started_later:
                assert nearest(started_later, 2) == "second"
            upsert(writer, "third", 3)
            writer.delete(Delete("", "", [("first", "")]))
            assert reader.follow()
            assert nearest(reader, 3) == "third"
            assert reader.sequence == 4
            assert nearest(reader, 1) != "first"


@pytest.mark.usefixtures("only_read")
def test_a_writer_that_came_and_went_between_two_reads_is_not_missed(folder: Path) -> None:
    """It leaves no log: the changes file is another one than before, and what was read of it is old."""
    with opened(folder) as writer:
        upsert(writer, "first", 1)
    with reading(folder) as reader:
        for seed in range(2, 5):
            with opened(folder) as writer:
                upsert(writer, f"key-{seed}", seed)
            assert not Path(f"{reader._store._changes_file}-wal").exists()
            assert reader.follow()
            assert nearest(reader, seed) == f"key-{seed}"


@pytest.mark.usefixtures("only_read")
def test_what_is_written_to_under_a_read_is_read_again_and_called_no_damage(folder: Path) -> None:
    with opened(folder) as writer:
        upsert(writer, "first", 1)
    with reading(folder) as reader:
        store = reader._store
        raises = pytest.raises(UnreadableChangesError, match="ask again")
        with raises as caught, store._reading(), opened(folder) as writer:
            upsert(writer, "second", 2)
        assert caught.value.retryable
        assert len(store.page(None, 100)) == 62


READER = """
import os, sys
from pathlib import Path
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import UnreadableChangesError
from tests.retriever_service.test_live_connection import nearest

os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    reader = LocalCorpus(Path(sys.argv[1]))
except UnreadableChangesError as error:
    print("refused:", error)
    raise SystemExit
print(reader.read_only_reason, flush=True)
for line in sys.stdin:
    changed, newer = reader.follow(), reader.open_newer()
    print(changed, newer and newer.number, nearest(reader, int(line)), flush=True)
"""


class OtherUser:
    """A reader in a process of a user that may only read."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", READER, str(folder), str(NOBODY)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def found(self, seed: int) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return self.line()

    def close(self) -> None:
        self._process.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that may only read")
def test_another_user_follows_to_changes_and_compactions(
    corpus: Path, build_corpus: Callable[..., Any]
) -> None:
    """It found rows without documents once the writer had compacted, and did not start beside a writer."""
    with tempfile.TemporaryDirectory() as parent, contextlib.ExitStack() as stack:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "index"
        build_corpus(corpus, folder)
        with opened(folder) as writer:
            upsert(writer, "first", 1)
        reader = stack.enter_context(contextlib.closing(OtherUser(folder)))
        assert reader.line().endswith("cannot be written to: Permission denied")
        assert reader.found(1) == "False None first"
        writer = stack.enter_context(opened(folder))
        upsert(writer, "second", 2)
        assert reader.found(2) == "True None second"
        later = stack.enter_context(contextlib.closing(OtherUser(folder)))
        assert "cannot be written to" in later.line()
        upsert(writer, "third", 3)
        writer.compact(lambda *_: None, threading.Event())
        for one in (reader, later):
            assert one.found(3) == "True 2 third"
        file = live_file(folder, 1)
        Path(f"{file}-shm").chmod(0o600)
        refused = stack.enter_context(contextlib.closing(OtherUser(folder)))
        assert refused.line().startswith(f"refused: {file}: its changes are in {file.name}-wal")
