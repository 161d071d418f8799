"""A retriever that takes no changes moves to the snapshots and folders that the one which does has moved to."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from rag_serving.errors import RagError
from retriever_service.corpus.base import CorpusLibrary
from retriever_service.generations import Generations
from retriever_service.retriever import Retriever

logger = logging.getLogger(__name__)


class Follower:
    """All methods belong to the event loop's thread."""

    def __init__(
        self,
        generations: Generations,
        library: CorpusLibrary,
        warm_up: Callable[[Retriever], Awaitable[None]],
    ) -> None:
        self._generations = generations
        self._library = library
        self._warm_up = warm_up
        self._complaint = ""

    async def run(self, interval_s: float) -> None:
        """Catches up again and again; what goes wrong is logged once, and tried again."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.catch_up()
                self._complaint = ""
            except (RagError, OSError) as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    logger.warning("cannot follow to what is active now: %s", error)

    async def catch_up(self) -> None:
        """Moves to what is active, and to its newest snapshot. Raises RagError or OSError where it cannot."""
        while True:
            current = self._generations.current.generation
            found = await asyncio.to_thread(self._library.newer, current, self._generations.corpora)
            if found is None:
                return
            corpus, generation = found
            served = self._generations.prepare(corpus, generation)
            try:
                await self._warm_up(served.retriever)
            except BaseException:
                await self._generations.abandon(served)
                raise
            self._generations.switch(served)
            logger.info(
                "followed", extra={"generation": generation.number, "index_folder": str(corpus.folder)}
            )
