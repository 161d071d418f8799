"""Kills a process that changes a corpus in Milvus, again and again, and checks what the next one finds."""

import collections
import contextlib
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from retriever_service.corpus.base import Corpus
from retriever_service.index.faiss_index import set_num_threads
from tests.faults.changing_milvus import change_until_killed, open_library
from tests.faults.kill_corpus import KilledCorpus
from tests.retriever_service.milvus_server import MilvusServer

# Each is imported by the first activation that names it.
_FOLDERS = {f"folder-{number}": ("Flat", "HNSW8")[number % 2] for number in range(6)}


class KilledMilvus(KilledCorpus):
    """Folders that become collections, of which one serves, and what must be in them."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed, _FOLDERS)
        self._server = MilvusServer(root / "milvus")
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
        with contextlib.closing(open_library(self._server.uri)) as library:
            if name is None:
                corpus: Corpus = library.active()
            else:
                corpus, _ = library.open(
                    self._root / name, library.next_number(), [], _no_progress, threading.Event()
                )
            try:
                assert corpus.read_only_reason is None, corpus.read_only_reason
                yield corpus
            finally:
                corpus.close()

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


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass


def run(root: Path, kills: int, seed: int, *, say: bool = False) -> collections.Counter[str]:
    """Kills so many processes; returns how often each kind of change was under way. Raises AssertionError."""
    set_num_threads(1)
    corpus = KilledMilvus(root, seed)
    try:
        return corpus.kill_often(kills, say=say)
    finally:
        corpus.stop()
