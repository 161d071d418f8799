"""Concurrent requests share searches, and nothing else."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from rag_serving.metrics import Metrics
from retriever_service import search_batcher
from retriever_service.index.base import VectorIndex
from retriever_service.metrics import RetrieverMetrics
from retriever_service.search_batcher import SearchBatcher
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters, Selection

OWN = SearchParameters()


class EchoIndex(VectorIndex):
    """Finds row int(vector[0]) n_docs times; 666 is a vector that it fails on; `gate` holds searches back."""

    def __init__(self, num_copies: int = 1) -> None:
        self.num_copies = num_copies
        self.calls: list[tuple[int, int, SearchParameters]] = []
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    @property
    def ntotal(self) -> int:
        return 1000

    @property
    def parallel_searches(self) -> int:
        return self.num_copies

    @property
    def dimension(self) -> int:
        return 2

    @property
    def metric(self) -> Metric:
        return Metric.INNER_PRODUCT

    def check_parameters(self, parameters: SearchParameters) -> None:
        return

    def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        self.calls.append((len(vectors), n_docs, parameters))
        self.begun.set()
        assert self.gate.wait(5)
        if (vectors[:, 0] == 666).any():
            raise RuntimeError("a search failed")
        rows = np.repeat(vectors[:, :1].astype(np.int64), n_docs, axis=1)
        return rows, rows.astype(np.float32)


def question(row: int, batch: int = 1) -> Float32Array:
    return np.full((batch, 2), row, dtype=np.float32)


@asynccontextmanager
async def batching(
    index: VectorIndex, window_s: float = 0.01, max_batch: int = 64
) -> AsyncIterator[SearchBatcher]:
    with ThreadPoolExecutor(index.parallel_searches) as executor:
        metrics = RetrieverMetrics(Metrics("retriever"))
        batcher = SearchBatcher(index, executor, metrics, window_s=window_s, max_batch=max_batch)
        try:
            yield batcher
        finally:
            await batcher.close()


async def test_concurrent_requests_share_searches_and_get_their_own_rows() -> None:
    index = EchoIndex()
    async with batching(index) as batcher:
        found = await asyncio.gather(
            *(batcher.search(question(row, 1 + row % 3), 2, OWN) for row in range(50))
        )
    for row, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.full((1 + row % 3, 2), row))
    assert len(index.calls) < 10
    assert max(count for count, _, _ in index.calls) <= 64


async def test_requests_that_differ_in_n_docs_or_parameters_never_share_a_search() -> None:
    index = EchoIndex()
    asked = [(2, OWN), (3, OWN), (2, SearchParameters(nprobe=4)), (2, SearchParameters(ef_search=4))] * 5
    async with batching(index) as batcher:
        found = await asyncio.gather(
            *(
                batcher.search(question(row), n_docs, parameters)
                for row, (n_docs, parameters) in enumerate(asked)
            )
        )
    assert [rows.shape for rows in found] == [(1, n_docs) for n_docs, _ in asked]
    assert [int(rows[0, 0]) for rows in found] == list(range(20))
    assert {(n_docs, parameters) for _, n_docs, parameters in index.calls} == set(asked)
    assert len(index.calls) < 20


async def test_failing_request_fails_alone() -> None:
    index = EchoIndex()
    async with batching(index) as batcher:
        found = await asyncio.gather(
            *(batcher.search(question(row), 1, OWN) for row in (1, 2, 666, 3)), return_exceptions=True
        )
        assert isinstance(found[2], RuntimeError)
        assert [int(found[at][0, 0]) for at in (0, 1, 3)] == [1, 2, 3]  # type: ignore[index]
        assert (await batcher.search(question(4), 1, OWN)).tolist() == [[4]]


async def test_cancelled_request_is_dropped_and_hurts_no_other() -> None:
    index = EchoIndex()
    async with batching(index) as batcher:
        index.gate.clear()
        running = asyncio.create_task(batcher.search(question(1), 1, OWN))
        await asyncio.to_thread(index.begun.wait, 5)
        waiting = [asyncio.create_task(batcher.search(question(row), 1, OWN)) for row in (2, 3, 4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        running.cancel()
        index.gate.set()
        assert [(await waiting[at]).tolist() for at in (0, 2)] == [[[2]], [[4]]]
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]
    assert sum(count for count, _, _ in index.calls) == 3


async def test_request_whose_time_is_up_while_it_waits_is_never_searched() -> None:
    index = EchoIndex()
    async with batching(index) as batcher:
        index.gate.clear()
        running = asyncio.create_task(batcher.search(question(1), 1, OWN))
        await asyncio.to_thread(index.begun.wait, 5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await batcher.search(question(2), 1, OWN)
        index.gate.set()
        assert (await running).tolist() == [[1]]
        assert (await batcher.search(question(3), 1, OWN)).tolist() == [[3]]
    assert len(index.calls) == 2


async def test_request_larger_than_a_search_is_searched_whole() -> None:
    index = EchoIndex()
    async with batching(index, max_batch=4) as batcher:
        found = await asyncio.gather(*(batcher.search(question(row, 6), 1, OWN) for row in (1, 2)))
    assert [rows.tolist() for rows in found] == [[[1]] * 6, [[2]] * 6]
    assert [count for count, _, _ in index.calls] == [6, 6]


async def test_request_that_comes_alone_does_not_wait_for_the_window() -> None:
    async with batching(EchoIndex(), window_s=30) as batcher, asyncio.timeout(5):
        for row in range(5):
            assert (await batcher.search(question(row), 1, OWN)).tolist() == [[row]]


async def test_requests_that_come_one_after_another_are_searched_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the clients waited while the other half were searched for, and the search took little less."""
    monkeypatch.setattr(search_batcher, "_LONGEST_GATHERING_S", 30)
    index = EchoIndex()
    async with batching(index, window_s=0.2) as batcher:
        index.gate.clear()
        first = [asyncio.create_task(batcher.search(question(row), 1, OWN)) for row in (1, 2)]
        await asyncio.to_thread(index.begun.wait, 5)
        await asyncio.sleep(1.5)  # so long a search makes the next one wait as long
        index.gate.set()
        await asyncio.gather(*first)
        crowd = []
        for row in range(3, 6):
            crowd.append(asyncio.create_task(batcher.search(question(row), 1, OWN)))
            await asyncio.sleep(0.12)
        assert [(await task).tolist() for task in crowd] == [[[row]] for row in range(3, 6)]
    assert [count for count, _, _ in index.calls] == [2, 3]


async def test_index_with_copies_has_a_search_running_on_each() -> None:
    index = EchoIndex(num_copies=2)
    async with batching(index, max_batch=1, window_s=0) as batcher:
        index.gate.clear()
        waiting = [asyncio.create_task(batcher.search(question(row), 1, OWN)) for row in range(6)]
        async with asyncio.timeout(5):
            while len(index.calls) < 2:  # noqa: ASYNC110  (a thread has no event to wait for)
                await asyncio.sleep(0.001)
        assert not any(task.done() for task in waiting)
        index.gate.set()
        assert [(await task).tolist() for task in waiting] == [[[row]] for row in range(6)]
    assert len(index.calls) == 6


async def _running_and_ready(
    index: EchoIndex, batcher: SearchBatcher, sizes: tuple[int, ...]
) -> list[list[asyncio.Task[Int64Array]]]:
    """A held search of two, and these crowds behind it."""
    index.gate.clear()
    crowds = []
    for size in (2, *sizes):
        crowds.append([asyncio.create_task(batcher.search(question(7), 1, OWN)) for _ in range(size)])
        await asyncio.sleep(0.05)
    assert [count for count, _, _ in index.calls] == [2]
    return crowds


@pytest.mark.parametrize(
    ("sizes", "searched"),
    [
        pytest.param((2,), [2, 2], id="a whole one"),
        pytest.param((1,), [2], id="a part of one waits for the loop"),
        pytest.param((2, 2), [2, 2], id="one for a copy of the index, and no more"),
    ],
)
async def test_whole_batch_is_searched_next_without_the_event_loop(
    sizes: tuple[int, ...], searched: list[int]
) -> None:
    index = EchoIndex()
    async with batching(index, max_batch=2) as batcher:
        crowds = await _running_and_ready(index, batcher, sizes)
        index.gate.set()
        time.sleep(0.2)  # noqa: ASYNC251  (nothing else runs in the loop meanwhile)
        assert [count for count, _, _ in index.calls] == searched
        await asyncio.gather(*(task for crowd in crowds for task in crowd))


async def test_batch_that_lies_ready_is_not_searched_once_nobody_waits_for_it() -> None:
    index = EchoIndex()
    async with batching(index, max_batch=2) as batcher:
        first, second = await _running_and_ready(index, batcher, (2,))
        for task in second:
            task.cancel()
        await asyncio.sleep(0)
        index.gate.set()
        await asyncio.gather(*first)
        assert (await batcher.search(question(8), 1, OWN)).tolist() == [[8]]
    assert [count for count, _, _ in index.calls] == [2, 1]


@pytest.mark.parametrize("turns", range(6))
async def test_closing_cancels_requests_whose_search_has_not_begun(turns: int) -> None:
    """At every turn of the loop between a request's coming and its search."""
    index = EchoIndex()
    index.gate.clear()
    async with batching(index, window_s=0) as batcher:
        waiting = asyncio.create_task(batcher.search(question(1), 1, OWN))
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.close()
        index.gate.set()
        async with asyncio.timeout(5):
            (end,) = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(end, asyncio.CancelledError)


async def test_closing_cancels_what_waits() -> None:
    index = EchoIndex()
    index.gate.clear()
    async with batching(index) as batcher:
        waiting = [asyncio.create_task(batcher.search(question(row), 1, OWN)) for row in range(3)]
        await asyncio.to_thread(index.begun.wait, 5)
        late = asyncio.create_task(batcher.search(question(9), 1, OWN))
        await asyncio.sleep(0)
        await batcher.close()
        index.gate.set()
    assert all(
        isinstance(end, asyncio.CancelledError)
        for end in await asyncio.gather(*waiting, late, return_exceptions=True)
    )
