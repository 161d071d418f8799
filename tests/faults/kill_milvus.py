"""Kills a process that changes a corpus in Milvus, or Milvus itself, and checks what the next one finds."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rag_serving.errors import UnavailableError
from retriever_service.corpus.base import Corpus
from retriever_service.index.faiss_index import set_num_threads
from retriever_service.milvus.library import MilvusLibrary
from tests.faults.changing_corpus import Change, Switch
from tests.faults.changing_milvus import change_until_killed, open_library
from tests.faults.kill_corpus import KilledCorpus
from tests.retriever_service.milvus_server import ENGINES

# Each is imported by the first activation that names it.
_FOLDERS = {f"folder-{number}": ("Flat", "HNSW8")[number % 2] for number in range(6)}

_LOADED_WITHIN_S = 300.0


class KilledMilvus(KilledCorpus):
    """Folders that become collections, of which one serves, and what must be in them."""

    longest_s = 0.6

    def __init__(self, root: Path, seed: int, engine: str) -> None:
        super().__init__(root, seed, _FOLDERS)
        self._server = ENGINES[engine](root / "milvus")
        self._server.start()
        with contextlib.closing(open_library(self._server.uri)) as library:
            corpus, generation = library.open(self.home, 1, [], _no_progress, threading.Event())
            library.remember(corpus, generation)
            corpus.close()

    def stop(self) -> None:
        """Ends Milvus."""
        self._server.stop()

    @contextlib.contextmanager
    def _opened(self, name: str | None) -> Iterator[Corpus]:
        until_s = time.monotonic() + _LOADED_WITHIN_S
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    library = stack.enter_context(contextlib.closing(open_library(self._server.uri)))
                    corpus = self._open(library, name)
                except UnavailableError:
                    # Milvus that was killed loads its collections for some seconds more.
                    if time.monotonic() > until_s:
                        raise
                    continue
                stack.callback(corpus.close)
                assert corpus.read_only_reason is None, corpus.read_only_reason
                yield corpus
                return

    def _open(self, library: MilvusLibrary, name: str | None) -> Corpus:
        if name is None:
            return library.active()
        number = library.next_number()
        return library.open(self._root / name, number, [], _no_progress, threading.Event())[0]

    def _check_others(self) -> None:
        """One of them each time: all take their time."""
        name = self._random.choice(sorted(_FOLDERS.keys() - {self.active}))
        with self._opened(name) as other:
            self._check(other)

    def _start(self, events: Connection, seed: int, switches: bool) -> Any:
        process = self._processes.Process(
            target=change_until_killed,
            args=(self._server.uri, sorted(_FOLDERS), events, seed, switches),
            daemon=True,
        )
        process.start()
        return process


class KilledEngine(KilledMilvus):
    """The same, where it is Milvus that is killed, and sometimes the process that waits for it soon after."""

    def _kill(self, process: Any) -> None:
        self._server.stop()
        time.sleep(self._random.choice((0.0, 0.5)))
        super()._kill(process)

    def _killed_at(self, kind: str) -> list[Change | Switch]:
        pending = super()._killed_at(kind)
        self._server.start()
        return pending


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass


def run(
    root: Path, kills: int, seed: int, *, say: bool = False, engine: str = "lite"
) -> collections.Counter[str]:
    """Kills so many processes; returns how often each kind of change was under way. Raises AssertionError."""
    return _kill_often(KilledMilvus(root, seed, engine), kills, say=say)


def run_engine(
    root: Path, kills: int, seed: int, *, say: bool = False, engine: str = "standalone"
) -> collections.Counter[str]:
    """Kills Milvus so many times; returns how often each kind of change was under way. Raises AssertionError."""
    return _kill_often(KilledEngine(root, seed, engine), kills, say=say)


def _kill_often(corpus: KilledMilvus, kills: int, *, say: bool) -> collections.Counter[str]:
    set_num_threads(1)
    try:
        return corpus.kill_often(kills, say=say)
    finally:
        corpus.stop()
