"""Documents and embeddings in SQLite."""

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from rag_serving.errors import DataLossError
from retriever_service.errors import DamagedIndexError
from retriever_service.store.sqlite import DuplicateKeyError, SqliteStore, SqliteWriter
from retriever_service.types import Document

DIM = 4
TEXTS = ["plain", "NUL \0 inside", "emoji 🦉 and ümlaut", "x" * (1 << 20), "quote ' \" \\ % _"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), DIM)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "with space # and ? in it.sqlite"
    writer = SqliteWriter(file)
    rows = [(f"key-{row}", "", text, '{"a": 1}' if row else None) for row, text in enumerate(TEXTS)]
    writer.append(rows[:2], VECTORS[:2])
    writer.append(rows[2:], VECTORS[2:])
    writer.finish()
    return file


def test_documents_come_back_as_they_were_written(file: Path) -> None:
    store = SqliteStore(file, DIM)
    assert len(store) == len(TEXTS)
    by_row = store.documents_by_row([4, 0, 2, 2, 99, -1, 1, 3])
    assert by_row == {
        row: Document(row, f"key-{row}", "", text, '{"a": 1}' if row else None)
        for row, text in enumerate(TEXTS)
    }
    assert store.documents_by_key(["key-3", "nope", "key-3"]) == {"key-3": by_row[3]}
    store.check()
    store.close()


def test_embeddings_come_in_the_order_asked_bit_for_bit(file: Path) -> None:
    store = SqliteStore(file, DIM)
    rows = [3, 0, 3, 1]
    np.testing.assert_array_equal(store.embeddings_of(rows), VECTORS[rows])
    np.testing.assert_array_equal(np.concatenate(list(store.embedding_chunks(2))), VECTORS)
    assert store.embeddings_of([]).shape == (0, DIM)
    store.close()


def test_row_without_an_embedding_is_data_loss(file: Path) -> None:
    store = SqliteStore(file, DIM)
    with pytest.raises(DataLossError, match="row 77"):
        store.embeddings_of([0, 77])
    store.close()


def test_finished_store_is_one_file(file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_key_given_twice_names_both_rows_and_writes_nothing(tmp_path: Path) -> None:
    writer = SqliteWriter(tmp_path / "d.sqlite")
    writer.append([("a", "", "t", None), ("b", "", "t", None)], VECTORS[:2])
    with pytest.raises(DuplicateKeyError) as caught:
        writer.append([("c", "", "t", None), ("b", "", "t", None)], VECTORS[:2])
    assert (caught.value.key, caught.value.first_row, caught.value.second_row) == ("b", 1, 3)
    writer.finish()
    store = SqliteStore(tmp_path / "d.sqlite", DIM)
    assert len(store) == 2
    store.close()


def test_many_rows_are_read_at_once(tmp_path: Path) -> None:
    writer = SqliteWriter(tmp_path / "d.sqlite")
    vectors = np.arange(3500 * DIM, dtype=np.float32).reshape(3500, DIM)
    writer.append([(str(row), "", "t", None) for row in range(3500)], vectors)
    writer.finish()
    store = SqliteStore(tmp_path / "d.sqlite", DIM)
    rows = list(reversed(range(3500)))
    np.testing.assert_array_equal(store.embeddings_of(rows), vectors[rows])
    assert len(store.documents_by_row(rows)) == 3500
    store.close()


def test_threads_read_at_once(file: Path) -> None:
    store = SqliteStore(file, DIM)
    wrong: list[int] = []

    def read() -> None:
        same = [np.array_equal(store.embeddings_of([2, 4]), VECTORS[[2, 4]]) for _ in range(50)]
        wrong.append(same.count(False))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(wrong) == 0
    store.close()


def test_connections_of_threads_that_have_ended_are_closed(file: Path) -> None:
    """They stayed until the store was closed: a few with each generation of one corpus."""
    store = SqliteStore(file, DIM)
    connections: list[sqlite3.Connection] = []

    def read() -> None:
        store.documents_by_row([0])
        connections.append(store._local.opened.connection)

    for _ in range(5):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert len(store._connections) == 1
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")
    assert len(store.documents_by_row([0, 1])) == 2
    store.close()


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "documents.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(DamagedIndexError, match=r"documents\.sqlite: SQLite cannot read it"):
        SqliteStore(tmp_path / "documents.sqlite", DIM)
