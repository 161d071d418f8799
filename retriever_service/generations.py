"""The generations that serve: one is current, a few older ones can be pinned, and each leaves when unused."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retriever_service.corpus.base import Corpus, Generation
from retriever_service.errors import GenerationGoneError
from retriever_service.index.manifest import Manifest
from retriever_service.metrics import RetrieverMetrics
from retriever_service.retriever import Retriever


@dataclass(eq=False, slots=True)
class Served:
    """A generation with the retriever that answers from it."""

    corpus: Corpus
    generation: Generation
    retriever: Retriever
    leases: int = 0
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What a generation was at one moment; it holds nothing of the index, and can be kept.

    `serving` are the generations that could be pinned then, oldest first.
    """

    number: int
    manifest: Manifest
    ntotal: int
    devices: Sequence[str]
    sequence: int
    pending_changes: int
    writable: bool
    serving: Sequence[int]
    index_folder: Path


class Generations:
    """All methods belong to the event loop's thread."""

    def __init__(
        self,
        corpus: Corpus,
        make_retriever: Callable[[Generation], Retriever],
        metrics: RetrieverMetrics,
        *,
        kept: int,
    ) -> None:
        """`kept` generations serve at most, the current one included."""
        self._make_retriever = make_retriever
        self._metrics = metrics
        self._kept = kept
        self._served: list[Served] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._add(corpus, corpus.generation)

    @property
    def current(self) -> Served:
        """What answers where a request pins nothing."""
        return self._served[-1]

    @property
    def numbers(self) -> list[int]:
        """Generations that can be pinned, oldest first."""
        return [served.generation.number for served in self._served]

    @property
    def corpora(self) -> list[Corpus]:
        """The corpora of the generations that serve, the current one's last."""
        return list(dict.fromkeys(served.corpus for served in reversed(self._served)))[::-1]

    @contextlib.contextmanager
    def lease(self, number: int = 0) -> Iterator[Served]:
        """Gives a generation, 0 the current one, that stays open as long. Raises GenerationGoneError."""
        served = self.current
        if number:
            found = [one for one in self._served if one.generation.number == number]
            if not found:
                raise GenerationGoneError(number, self.numbers)
            served = found[0]
        served.leases += 1
        try:
            yield served
        finally:
            served.leases -= 1
            self._leave_if_unused(served)

    def prepare(self, corpus: Corpus, generation: Generation) -> Served:
        """Makes a retriever for a generation that does not serve yet."""
        return Served(corpus, generation, self._make_retriever(generation))

    def switch(self, served: Served) -> None:
        """Makes a prepared generation current: every search that begins from now on is answered by it."""
        self._served.append(served)
        while len(self._served) > self._kept:
            self._drop(self._served.pop(0))
        self.show()

    async def abandon(self, served: Served) -> None:
        """Gives up a prepared generation; returns once its corpus has let go of it, and of its number."""
        served.is_dropped = True
        await self._leave(served)

    def describe(self, served: Served) -> Description:
        """Says what a generation, whose corpus is open, is now."""
        generation, corpus = served.generation, served.corpus
        return Description(
            number=generation.number,
            manifest=generation.manifest,
            ntotal=generation.index.ntotal,
            devices=generation.index.devices,
            sequence=corpus.sequence,
            pending_changes=corpus.pending_changes,
            writable=corpus.read_only_reason is None,
            serving=self.numbers,
            index_folder=corpus.folder,
        )

    def show(self) -> None:
        """Brings the gauges up to date."""
        self._metrics.index_vectors.set(self.current.generation.index.ntotal)
        self._metrics.index_generation.set(self.current.generation.number)
        self._metrics.index_device.clear()
        for device in self.current.generation.index.devices:
            self._metrics.index_device.labels(device).set(1)
        self._metrics.index_fallback.clear()
        fallback = self.current.generation.index.fallback
        if fallback is not None:
            self._metrics.index_fallback.labels(fallback.value).set(1)

    async def close(self) -> None:
        """Closes all of them."""
        while self._served:
            self._drop(self._served.pop())
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _add(self, corpus: Corpus, generation: Generation) -> None:
        self.switch(self.prepare(corpus, generation))

    def _drop(self, served: Served) -> None:
        served.is_dropped = True
        self._leave_if_unused(served)

    def _leave_if_unused(self, served: Served) -> None:
        if served.is_dropped and not served.leases:
            task = asyncio.create_task(self._leave(served), name="close generation")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, served: Served) -> None:
        await served.retriever.close()
        if served.corpus in self.corpora:
            await asyncio.to_thread(served.corpus.release, served.generation)
        else:
            await asyncio.to_thread(served.corpus.close)
        if self._served:
            # The one that serves may have found room on a GPU just now.
            self.show()
