"""Changes, compaction and activation of the corpus that serves."""

import asyncio
import contextvars
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple

from rag_serving.errors import InvalidArgumentError, RagError, UnavailableError
from rag_serving.request_deadline import request_deadline_s
from retriever_service.corpus.base import Corpus, CorpusLibrary, Delete, Deleted, Page, Upsert, Upserted
from retriever_service.errors import BuildError, NoPassageEncoderError, ReadOnlyError
from retriever_service.generations import Description, Generations, Served
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.niceness import give_way
from retriever_service.operations import Operation, Operations
from retriever_service.retriever import Retriever
from retriever_service.types import Float32Array
from retriever_service.work_limit import WorkLimit, run_limited

logger = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT")
ArgumentTs = TypeVarTuple("ArgumentTs")


class Encoder(Protocol):
    """What makes the embeddings of documents that come without."""

    def description(self) -> Embedding:
        """How the vectors are made."""

    def encode(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        """Returns float32 [len, dim] for (title, text) pairs."""


class Maintenance:
    """All methods belong to the event loop's thread; the work is done in others.

    Changes are done one after another, and a switch of generations stands between two of them: what was
    acknowledged before an activation is in the corpus of before, what comes after is in the new one.
    """

    def __init__(
        self,
        generations: Generations,
        library: CorpusLibrary,
        warm_up: Callable[[Retriever], Awaitable[None]],
        *,
        activation_root: Path | None,
        encoder: Encoder | None = None,
        compact_after: int = 0,
    ) -> None:
        """Only folders of `library` below `activation_root` can be activated, and none without one.

        `compact_after` pending changes begin a compaction by themselves; 0 never.
        """
        self._generations = generations
        self._library = library
        self._warm_up = warm_up
        self._activation_root = activation_root
        self._encoder = encoder
        self._compact_after = compact_after
        self._changing = asyncio.Lock()
        self._changes = ThreadPoolExecutor(1, "changes", initializer=give_way)
        # Indexes are written, read and hashed here, whole cores for seconds.
        self._switching = ThreadPoolExecutor(1, "switch", initializer=give_way)
        self._encoding = ThreadPoolExecutor(1, "encode")
        self._compaction_failed_at = -1
        self.operations: Operations[Description] = Operations()

    async def upsert(self, batch: Upsert) -> Upserted:
        """Writes a batch into the corpus that serves: see Corpus.upsert."""
        return await self._change(lambda corpus: corpus.upsert(batch))

    async def delete(self, batch: Delete) -> Deleted:
        """Deletes a batch from the corpus that serves: see Corpus.delete."""
        return await self._change(lambda corpus: corpus.delete(batch))

    async def embed(self, passages: Sequence[tuple[str, str]], embedding: Embedding) -> Float32Array:
        """Makes the embeddings of (title, text), as those of the index were made.

        Raises NoPassageEncoderError where this service has no encoder, or another one than the index's.
        """
        if self._encoder is None:
            raise NoPassageEncoderError(
                "embeddings: give them, or start the retriever with --embedding-model"
            )
        made = self._encoder.description()
        name = made.name
        if made.digest is not None:
            # Weights and settings say more than the name that the encoder went by when the service started.
            made = made.model_copy(update={"name": embedding.name})
        if made != embedding:
            raise NoPassageEncoderError(
                f"embeddings: this service's encoder makes {name!r}, the index has {embedding.name!r}"
                " or was made with other settings: give the embeddings"
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._encoding, self._encoder.encode, passages)
        except BuildError as error:
            raise InvalidArgumentError("documents", error.message) from error

    async def page(self, after_key: str | None, size: int) -> tuple[Page, int]:
        """Returns documents by key, and how many there are."""
        with self._generations.lease() as served:
            page = await run_limited(None, served.corpus.page, after_key, size)
            return page, served.generation.index.ntotal

    def compact(self) -> Operation[Description]:
        """Begins a compaction. Raises ReadOnlyError or OperationRunningError."""
        corpus = self._generations.current.corpus
        if corpus.read_only_reason is not None:
            raise ReadOnlyError(f"no compaction here: {corpus.read_only_reason}")
        return self.operations.start("compact", self._compact)

    def activate(self, folder: str, check: Callable[[Manifest], None]) -> Operation[Description]:
        """Begins to activate an index folder. `check` raises where the index does not fit the callers; it is asked
        again and again, the last time just before the switch.

        Raises InvalidArgumentError for a folder outside of the activation root, ReadOnlyError or
        OperationRunningError.
        """
        if self._library.refused is not None:
            raise ReadOnlyError(f"no activation here: {self._library.refused}")
        if self._activation_root is None:
            raise ReadOnlyError("no activation here: this retriever was started without --activation-root")
        path = _folder_below(self._activation_root.resolve(), folder)

        async def work(operation: Operation[Description]) -> Description:
            return await self._activate(path, check, operation)

        return self.operations.start("activate", work)

    def compact_if_due(self) -> None:
        """Begins a compaction where enough changes are pending and nothing else runs."""
        corpus = self._generations.current.corpus
        pending = corpus.pending_changes
        due = self._compact_after and pending >= self._compact_after
        # One that failed is tried again once as many changes have come as would have begun it.
        failed_at = self._compaction_failed_at
        if not due or (failed_at >= 0 and pending < failed_at + self._compact_after):
            return
        try:
            self.compact()
        except RagError as error:
            logger.debug("no compaction now: %s", error.message)

    async def follow(self, interval_s: float, reached: Callable[[str | None], None]) -> None:
        """Shows searches, again and again, what another process writes to a corpus that is read-only here.

        `reached` hears each time why a corpus cannot be reached, None where all can.
        """
        while True:
            await asyncio.sleep(interval_s)
            reason: str | None = None
            for corpus in self._generations.corpora:
                try:
                    if await asyncio.to_thread(corpus.follow):
                        self._generations.show()
                except UnavailableError as error:
                    reason = error.message
                except RagError as error:
                    logger.warning("cannot read the changes: %s", error.message)
            reached(reason)

    async def close(self) -> None:
        """Stops what runs; changes that have begun are finished."""
        await self.operations.close()
        async with self._changing:
            self._changes.shutdown()
        self._switching.shutdown(wait=False)
        self._encoding.shutdown()

    async def _change(self, work: Callable[[Corpus], AnswerT]) -> AnswerT:
        async with self._changing:
            corpus = self._generations.current.corpus
            loop = asyncio.get_running_loop()
            limit = WorkLimit(request_deadline_s())
            running = loop.run_in_executor(self._changes, limit.run, work, corpus)
            try:
                # Shielded: a caller that goes away must not free the lock while its change is written.
                answer = await asyncio.shield(running)
            except asyncio.CancelledError:
                limit.leave()
                await asyncio.wait([running])
                raise
        self._generations.show()
        self.compact_if_due()
        return answer

    async def _compact(self, operation: Operation[Description]) -> Description:
        corpus = self._generations.current.corpus
        try:
            generation = await self._giving_way(corpus.compact, operation.progress, operation.cancelled)
        except RagError:
            self._compaction_failed_at = corpus.pending_changes
            raise
        self._compaction_failed_at = -1
        served = self._generations.prepare(corpus, generation)
        return await self._switch(served, operation)

    async def _activate(
        self, path: Path, check: Callable[[Manifest], None], operation: Operation[Description]
    ) -> Description:
        check(await asyncio.to_thread(self._library.manifest, path))
        corpus, generation = await self._giving_way(
            self._library.open,
            path,
            self._generations.current.generation.number + 1,
            self._generations.corpora,
            operation.progress,
            operation.cancelled,
        )
        served = self._generations.prepare(corpus, generation)
        try:
            operation.check()
            check(generation.manifest)
        except BaseException:
            await self._generations.abandon(served)
            raise
        return await self._switch(served, operation, check)

    async def _giving_way(self, work: Callable[[*ArgumentTs], AnswerT], *arguments: *ArgumentTs) -> AnswerT:
        """Runs the long part of an operation in a thread that searches go before."""
        run = functools.partial(contextvars.copy_context().run, work, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._switching, run)

    async def _switch(
        self,
        served: Served,
        operation: Operation[Description],
        check: Callable[[Manifest], None] | None = None,
    ) -> Description:
        """Warms up, then, between two changes, switches; what is activated has a `check`, and is remembered."""
        try:
            operation.progress("warm up", 0, 1)
            await self._warm_up(served.retriever)
            async with self._changing:
                if check is not None:
                    operation.check()
                    check(served.generation.manifest)
                    await asyncio.to_thread(self._library.remember, served.corpus, served.generation)
                self._generations.switch(served)
        except BaseException:
            await self._generations.abandon(served)
            raise
        operation.progress("done", served.generation.manifest.ntotal, served.generation.manifest.ntotal)
        return self._generations.describe(served)


def _folder_below(root: Path, folder: str) -> Path:
    """Returns the path of a folder below `root`, there or not. Raises InvalidArgumentError where it can be none."""
    field, what = "index_folder", f"must be a folder below {root}"
    if not folder or "\0" in folder:
        raise InvalidArgumentError(field, what, folder)
    try:
        path = (root / folder).resolve()
        if not path.is_relative_to(root):
            raise InvalidArgumentError(field, what, folder)
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgumentError(field, f"{what}: {why}", folder) from error
    return path
