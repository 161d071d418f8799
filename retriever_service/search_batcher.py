"""Gathers concurrent requests into one search of the index."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rag_serving.request_deadline import request_deadline_s
from retriever_service.index.base import VectorIndex
from retriever_service.metrics import RetrieverMetrics
from retriever_service.types import Float32Array, Int64Array, SearchParameters, Selection
from retriever_service.work_limit import WorkLimit

FinishedT = TypeVar("FinishedT")
_PAUSE_OF_SEARCH = 0.1
_LONGEST_PAUSE_S = 0.005
_LONGEST_GATHERING_S = 0.05
"""About what 64 clients need to read their answers and ask again, whatever the search takes."""


@dataclass(eq=False, slots=True)
class _Waiting:
    vectors: Float32Array
    n_docs: int
    parameters: SearchParameters
    selection: Selection | None
    found: asyncio.Future[tuple[Int64Array, Any]]
    since_s: float
    finish: Callable[[Int64Array], Any] | None
    deadline_s: float | None
    limit: WorkLimit | None = None

    @property
    def key(self) -> tuple[int, SearchParameters, Selection | None]:
        """Requests with the same key can share a search."""
        return self.n_docs, self.parameters, self.selection


class SearchBatcher:
    """Searches for many requests at once, in a thread; one search at a time, or one for each copy of the index.

    While searches run, requests gather for the next; a whole batch lies ready behind the search that runs. Where they
    come close together, those that a search has just answered ask again: the next one waits until they are back, for
    a search of all takes little more than one of half of them. A request that comes alone is searched at once. One
    that was cancelled while it waited is dropped, and a search ends with the last of its requests where the index
    can end one (WorkLimit); where a shared search fails, each of its requests is searched alone, so that only the
    one at fault fails. All methods belong to the event loop's thread.
    """

    def __init__(
        self,
        index: VectorIndex,
        executor: Executor,
        metrics: RetrieverMetrics,
        *,
        window_s: float,
        max_batch: int,
    ) -> None:
        """`window_s` is how long nobody may come before those that gathered are searched; 0 gathers for no time.

        `max_batch` is the number of vectors of a search at most, unless one request alone has more.
        """
        self._index = index
        self._executor = executor
        self._metrics = metrics
        self._window_s = window_s
        self._max_batch = max_batch
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._gathered_last = 1
        self._last_search_s = 0.0
        self._dispatcher: asyncio.Task[None] | None = None
        self._served: set[asyncio.Task[None]] = set()

    async def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> Int64Array:
        """Returns rows int64 [batch, at most n_docs] of vectors float32 [batch, dim], -1 for missing hits."""
        return (await self.search_and_finish(vectors, n_docs, parameters, selection, None))[0]

    async def search_and_finish(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None,
        finish: Callable[[Int64Array], FinishedT] | None,
    ) -> tuple[Int64Array, FinishedT | None]:
        """Searches: see `search`.

        For a single question that comes alone, also what `finish` makes of its rows, in the same thread: handing
        them to another one takes longer than most of what is left to do. None where others wait.
        """
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch(), name="search batcher")
        found: asyncio.Future[tuple[Int64Array, FinishedT | None]]
        found = asyncio.get_running_loop().create_future()
        waiting = _Waiting(
            vectors, n_docs, parameters, selection, found, time.monotonic(), finish, request_deadline_s()
        )
        self._queue.append(waiting)
        self._changed.set()
        try:
            return await found
        except asyncio.CancelledError:
            if waiting.limit is not None:
                waiting.limit.leave()
            raise

    async def close(self) -> None:
        """Stops; requests still waiting are cancelled."""
        running = [*self._served] if self._dispatcher is None else [self._dispatcher, *self._served]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while self._queue:
            self._queue.popleft().found.cancel()

    async def _dispatch(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._queue and self._may_start():
                if self._window_s > 0:
                    await self._gather()
                self._start(self._take())

    def _may_start(self) -> bool:
        """Whether a copy is free, or a whole batch waits: then it lies ready for the thread that is free next.

        The thread would else wait for the event loop, and that one for the interpreter's lock.
        """
        running, copies = len(self._served), self._index.parallel_searches
        return running < copies or (running < 2 * copies and self._is_full())

    def _start(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        self._gathered_last = len(batch)
        serving = asyncio.create_task(self._serve(batch), name="search")
        self._served.add(serving)
        serving.add_done_callback(functools.partial(self._end, batch))

    def _end(self, batch: list[_Waiting], serving: asyncio.Task[None]) -> None:
        for waiting in batch:  # those left over where serving was cancelled, perhaps before it began
            waiting.found.cancel()
        self._served.discard(serving)
        self._changed.set()

    async def _gather(self) -> None:
        """Waits while others come, at most as long as the last search took; the longer that was, the calmer."""
        pause_s = max(self._window_s, min(_LONGEST_PAUSE_S, _PAUSE_OF_SEARCH * self._last_search_s))
        ends_s = time.monotonic() + max(self._window_s, min(_LONGEST_GATHERING_S, self._last_search_s))
        num_waiting = 0
        while num_waiting != len(self._queue) and self._comes_in_crowds() and time.monotonic() < ends_s:
            num_waiting = len(self._queue)
            await asyncio.sleep(pause_s)

    def _comes_in_crowds(self) -> bool:
        return not self._is_full() and (self._gathered_last > 1 or len(self._queue) > 1)

    def _is_full(self) -> bool:
        """Whether as many vectors wait as a search takes."""
        return sum(len(waiting.vectors) for waiting in self._queue) >= self._max_batch

    def _take(self) -> list[_Waiting]:
        """Takes the oldest request and those that can share its search; the others keep their order."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        num_vectors = 0
        for waiting in self._queue:
            if waiting.found.done():
                continue
            fits = not batch or num_vectors + len(waiting.vectors) <= self._max_batch
            if fits and (not batch or waiting.key == batch[0].key):
                batch.append(waiting)
                num_vectors += len(waiting.vectors)
            else:
                left.append(waiting)
        self._queue = left
        return batch

    async def _serve(self, batch: list[_Waiting]) -> None:
        try:
            rows, finished, began_s, ended_s = await self._run(batch)
        except Exception as error:  # noqa: BLE001  (whatever it is belongs to the requests, not to the loop)
            await self._serve_failed(batch, error)
            return
        self._last_search_s = ended_s - began_s
        start = 0
        for waiting in batch:
            self._metrics.queue_wait_seconds.observe(began_s - waiting.since_s)
            if not waiting.found.done():
                waiting.found.set_result((rows[start : start + len(waiting.vectors)], finished))
            start += len(waiting.vectors)

    async def _serve_failed(self, batch: list[_Waiting], error: Exception) -> None:
        if len(batch) == 1:
            if not batch[0].found.done():
                batch[0].found.set_exception(error)
            return
        for waiting in batch:
            if not waiting.found.done():
                await self._serve([waiting])

    async def _run(self, batch: list[_Waiting]) -> tuple[Int64Array, Any, float, float]:
        """Returns rows, what `finish` made of them, and when the search began and ended."""
        vectors = batch[0].vectors if len(batch) == 1 else np.concatenate([one.vectors for one in batch])
        self._metrics.search_batch_questions.observe(len(vectors))
        n_docs, parameters, selection = batch[0].key
        finish = batch[0].finish if len(vectors) == 1 and not self._queue else None
        limit = WorkLimit.latest(one.deadline_s for one in batch)
        for one in batch:
            one.limit = limit

        def search() -> tuple[Int64Array, Any, float, float]:
            limit.left_s()  # nobody may wait any more: the batch may have lain behind another one's search
            began_s = time.monotonic()
            with self._metrics.search_seconds.time():
                rows = self._index.search(vectors, n_docs, parameters, selection)[0]
            ended_s = time.monotonic()
            return rows, None if finish is None else finish(rows), began_s, ended_s

        return await asyncio.get_running_loop().run_in_executor(self._executor, limit.run, search)
