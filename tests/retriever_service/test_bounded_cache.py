"""A cache bounded by bytes, and the reader of passages that stands on it."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import DataLossError
from retriever_service.bounded_cache import BoundedCache
from retriever_service.store.passage_reader import PassageCache, PassageReader
from retriever_service.store.sqlite import SqliteStore, SqliteWriter


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    cache: BoundedCache[str, int] = BoundedCache(100)
    cache.put_all([("a", 1, 40), ("b", 2, 40)])
    assert cache.get_all(["a"]) == [1]
    cache.put_all([("c", 3, 40)])
    assert cache.get_all(["a", "b", "c"]) == [1, None, 3]
    assert cache.size_bytes == 80


def test_what_is_larger_than_all_of_it_pushes_nothing_out() -> None:
    cache: BoundedCache[str, int] = BoundedCache(100)
    cache.put_all([("a", 1, 40), ("whale", 2, 101)])
    assert cache.get_all(["a", "whale"]) == [1, None]
    cache.put_all([("a", 5, 90)])
    assert cache.get_all(["a"]) == [1]
    assert (len(cache), cache.size_bytes) == (1, 40)


def test_no_bytes_keep_nothing() -> None:
    cache: BoundedCache[str, int] = BoundedCache(0)
    cache.put_all([("a", 1, 1)])
    assert (cache.get_all(["a"]), len(cache)) == ([None], 0)


def test_threads_never_count_wrong() -> None:
    cache: BoundedCache[int, int] = BoundedCache(500)

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 100, 2000).tolist():
            if cache.get_all([key])[0] is None:
                cache.put_all([(key, key, 7 + key % 5)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [key for key in range(100) if cache.get_all([key])[0] is not None]
    assert cache.size_bytes == sum(7 + key % 5 for key in held) <= 500
    assert len(cache) == len(held)


class _CountingStore(SqliteStore):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.read: list[list[int]] = []

    def embeddings_of(self, rows: Sequence[int]) -> Any:
        self.read.append(list(rows))
        return super().embeddings_of(rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = SqliteWriter(tmp_path / "documents.sqlite")
    writer.append([(f"k{row}", "t", f"text {row}", None) for row in range(10)], _vectors())
    writer.finish()
    return tmp_path / "documents.sqlite"


def _vectors() -> Any:
    return np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def test_rows_read_before_are_not_read_again_and_every_store_has_its_own(file: Path) -> None:
    cache: PassageCache = BoundedCache(1 << 20)
    one, other = _CountingStore(file, 4), _CountingStore(file, 4)
    assert [passage.document.key for passage in PassageReader(one, cache).read([7, 2])] == ["k7", "k2"]
    found = PassageReader(one, cache).read([2, 5, 7])
    assert [passage.document.row for passage in found] == [2, 5, 7]
    np.testing.assert_array_equal([passage.embedding for passage in found], _vectors()[[2, 5, 7]])
    assert one.read == [[7, 2], [5]]
    PassageReader(other, cache).read([2])
    assert other.read == [[2]]
    one.close()
    other.close()


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_row_that_the_store_does_not_have_is_data_loss(file: Path, max_bytes: int) -> None:
    store = SqliteStore(file, 4)
    with pytest.raises(DataLossError, match="row 10"):
        PassageReader(store, BoundedCache(max_bytes)).read([3, 10])
    store.close()
