"""Filters as rows: each evaluated once for a version of the corpus, and kept while it is used."""

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor

from retriever_service.filters import Filter
from retriever_service.store.base import DocumentStore
from retriever_service.types import Selection

_MAX_FILTERS = 256


class Selections:
    """The selections of the filters that came last. All methods belong to the event loop's thread.

    Requests that come with one filter at one time wait for one evaluation.
    """

    def __init__(self, store: DocumentStore, executor: Executor, *, max_rows: int = 16_777_216) -> None:
        """`max_rows` is what the selections kept hold together; eight bytes each."""
        self._store = store
        self._executor = executor
        self._max_rows = max_rows
        # By repr: to Python, 1, 1.0 and True are equal, and so would be filters that differ in nothing else.
        self._kept: OrderedDict[str, Selection] = OrderedDict()
        self._running: dict[str, asyncio.Task[Selection]] = {}

    async def of(self, condition: Filter) -> Selection:
        """Returns the rows that meet the condition. Raises what the store raises."""
        key = f"{self._store.version} {condition!r}"
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._evaluate(key, condition), name="filter")
            self._running[key] = task
        # Shielded: the request that began it may be cancelled while others wait.
        return await asyncio.shield(task)

    async def _evaluate(self, key: str, condition: Filter) -> Selection:
        try:
            loop = asyncio.get_running_loop()
            selection = await loop.run_in_executor(self._executor, self._store.select, condition)
            self._keep(key, selection)
            return selection
        finally:
            del self._running[key]

    def _keep(self, key: str, selection: Selection) -> None:
        self._kept[key] = selection
        while len(self._kept) > _MAX_FILTERS or (
            len(self._kept) > 1 and sum(len(one) for one in self._kept.values()) > self._max_rows
        ):
            self._kept.popitem(last=False)
