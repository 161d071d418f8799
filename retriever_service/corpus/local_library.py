"""Index folders as corpora: the one that is active is written down in the retriever's own."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rag_serving.errors import FailedPreconditionError
from retriever_service.corpus.active import active_version, read_active, write_active
from retriever_service.corpus.base import Corpus, CorpusLibrary, Generation, Progress
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DiskFullError, MissingIndexError, ReadOnlyError, is_full
from retriever_service.index.gpu.pool import GpuPool
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import Snapshot


class LocalLibrary(CorpusLibrary):
    """Opens folders where they lie."""

    def __init__(
        self,
        home: Path,
        open_corpus: Callable[[Path, int], LocalCorpus],
        *,
        refused: str | None,
        followed: tuple[int, int] | None,
        gpus: GpuPool | None,
    ) -> None:
        """`home` remembers what is active; `open_corpus` takes a folder and the offset of its generations' numbers.

        `followed` is the `active_version` of before the first was opened; `gpus`, where there are some, hold the
        indexes.
        """
        self._home = home
        self._open_corpus = open_corpus
        self._refused = refused
        self._followed = followed
        self._gpus = gpus

    @property
    def refused(self) -> str | None:
        """Why nothing can be activated: see CorpusLibrary."""
        return self._refused

    def manifest(self, folder: Path) -> Manifest:
        """Reads what a folder holds: see CorpusLibrary."""
        try:
            return Snapshot.open(folder).manifest
        except MissingIndexError as error:
            raise FailedPreconditionError(error.message, reason=error.reason) from error
        except OSError as error:
            raise FailedPreconditionError(f"{folder} cannot be read: {error}") from error

    def open(
        self,
        folder: Path,
        number: int,
        serving: Sequence[Corpus],
        progress: Progress,
        _cancelled: threading.Event,
    ) -> tuple[Corpus, Generation]:
        """Opens a folder: see CorpusLibrary."""
        progress("load", 0, 1)
        try:
            for corpus in serving:
                if not isinstance(corpus, LocalCorpus) or corpus.folder.resolve() != folder:
                    continue
                if corpus.has_newest_build():
                    return corpus, corpus.renumber(number)
            opened = self._open_corpus(folder, number - Snapshot.open(folder).manifest.generation)
        except MissingIndexError as error:
            raise FailedPreconditionError(error.message, reason=error.reason) from error
        return opened, opened.generation

    def newer(self, current: Generation, serving: Sequence[Corpus]) -> tuple[Corpus, Generation] | None:
        """Opens what another retriever has compacted or activated: see CorpusLibrary.

        Generations get the numbers that they have there. A build into the folder that serves is not followed:
        nor does the other one, until the folder is activated.
        """
        if self._refused is None:
            return None
        version = active_version(self._home)
        if version != self._followed:
            activated = self._activated(current, serving)
            if activated is not None:
                return activated
            self._followed = version
        corpus = serving[-1]
        generation = corpus.open_newer() if isinstance(corpus, LocalCorpus) else None
        return None if generation is None else (corpus, generation)

    def _activated(self, current: Generation, serving: Sequence[Corpus]) -> tuple[Corpus, Generation] | None:
        folder, offset = read_active(self._home)
        number = Snapshot.open(folder).manifest.generation + offset
        for corpus in serving:
            if not isinstance(corpus, LocalCorpus) or corpus.folder.resolve() != folder.resolve():
                continue
            if corpus.has_newest_build():
                if corpus is serving[-1] and number == current.number:
                    return None
                corpus.follow()
                return corpus, corpus.renumber(number)
        opened = self._open_corpus(folder, offset)
        return opened, opened.generation

    def remember(self, corpus: Corpus, generation: Generation) -> None:
        """Writes ACTIVE: see CorpusLibrary."""
        offset = generation.number - generation.manifest.generation
        try:
            write_active(self._home, corpus.folder, offset)
        except OSError as error:
            if is_full(error):
                raise DiskFullError(f"{self._home}: {error}", retry_after_s=5.0) from error
            raise ReadOnlyError(f"{self._home} cannot be written to: {error}") from error

    def close(self) -> None:
        """Lets the GPUs go."""
        if self._gpus is not None:
            self._gpus.close()
