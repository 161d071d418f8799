"""A process that changes a corpus until it is killed, and says before and after each change what it does."""

import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np

from retriever_service.corpus.active import read_active, write_active
from retriever_service.corpus.base import Corpus, Delete, Deleted, NewDocument, Upsert, Upserted
from retriever_service.corpus.local import LocalCorpus
from retriever_service.index.manifest import Embedding
from retriever_service.types import Float32Array

AnswerT = TypeVar("AnswerT")

DIMENSION = 8
EMBEDDING = Embedding(name="tiny-encoder")
FOLDERS = ("flat", "graph")
_KEYS = [f"doc-{number}" for number in range(150)]
_LARGEST_BATCH = 12


@dataclass(frozen=True, slots=True)
class Change:
    """An upsert or a delete; `texts` by key, None for a deletion."""

    kind: str
    folder: str
    request_id: str
    texts: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Switch:
    """A compaction of a folder, or its activation."""

    kind: str
    folder: str


Event = tuple[str, Change | Switch, Upserted | Deleted | None]
"""("begun" or "done", what, the answer)."""


def vector_of(text: str) -> Float32Array:
    """Returns the embedding float32 [8] that belongs to a text."""
    seed = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def apply(corpus: Corpus, change: Change) -> Upserted | Deleted:
    """Makes a change."""
    if change.kind == "delete":
        return corpus.delete(Delete(change.request_id, "d", [(key, "") for key in change.texts]))
    documents = [NewDocument(key, "", text or "") for key, text in change.texts.items()]
    vectors = np.stack([vector_of(document.text) for document in documents])
    return corpus.upsert(Upsert(change.request_id, "d", documents, vectors, False, EMBEDDING))


def open_active(home: Path) -> LocalCorpus:
    """Opens what serves for `home`, as a retriever does when it starts."""
    folder, offset = read_active(home)
    return LocalCorpus(folder, number_offset=offset)


class ChangingCorpus(ABC):
    """Changes come from one thread; compaction and activation run beside them, one at a time."""

    def __init__(self, corpus: Corpus, folders: Sequence[str], events: Connection, seed: int) -> None:
        self._corpus = corpus
        self._folders = folders
        self._events = events
        self._random = random.Random(seed)
        self._changing = threading.Lock()
        self._telling = threading.Lock()
        self._count = 0
        self._seed = seed

    @abstractmethod
    def _activated(self, folder: Path) -> None:
        """Makes a folder the corpus that serves, while it holds `_changing`."""

    def _done(self, work: Callable[[Corpus], AnswerT]) -> AnswerT:
        """Does something to the corpus."""
        return work(self._corpus)

    def run(self, switches: bool) -> None:
        """Changes the corpus without end; with `switches`, also compacts and activates."""
        if switches:
            threading.Thread(target=self._switch, daemon=True).start()
        while True:
            with self._changing:
                change = self._next_change()
                self._tell("begun", change)
                self._tell("done", change, self._done(lambda corpus, change=change: apply(corpus, change)))

    def _next_change(self) -> Change:
        self._count += 1
        kind = self._random.choice(("upsert", "upsert", "delete"))
        keys = self._random.sample(_KEYS, self._random.randint(1, _LARGEST_BATCH))
        request_id = f"{self._seed}-{self._count}"
        texts = {key: f"{key} of {request_id}" if kind == "upsert" else None for key in keys}
        return Change(kind, self._corpus.folder.name, request_id, texts)

    def _switch(self) -> None:
        choose = random.Random(self._seed)
        while True:
            if choose.random() < 0.5:
                self._compact()
            else:
                self._activate(choose.choice(self._folders))

    def _compact(self) -> None:
        corpus = self._corpus
        switch = Switch("compact", corpus.folder.name)
        self._tell("begun", switch)
        before = corpus.generation
        self._done(lambda _: corpus.compact(_no_progress, threading.Event()))
        corpus.release(before)
        self._tell("done", switch)

    def _activate(self, name: str) -> None:
        before = self._corpus
        folder = before.folder.parent / name
        if folder == before.folder:
            return
        switch = Switch("activate", name)
        self._tell("begun", switch)
        self._activated(folder)
        before.close()
        self._tell("done", switch)

    def _tell(self, what: str, change: Change | Switch, answer: Upserted | Deleted | None = None) -> None:
        with self._telling:
            self._events.send((what, change, answer))


class ChangingLocal(ChangingCorpus):
    """In index folders."""

    def __init__(self, home: Path, events: Connection, seed: int) -> None:
        super().__init__(open_active(home), FOLDERS, events, seed)
        self._home = home

    def _activated(self, folder: Path) -> None:
        corpus = LocalCorpus(folder)
        # Numbers of generations only grow.
        generation = corpus.renumber(max(corpus.generation.number, self._corpus.generation.number) + 1)
        with self._changing:
            write_active(self._home, folder, generation.number - generation.manifest.generation)
            self._corpus = corpus


def change_until_killed(home: Path, events: Connection, seed: int, switches: bool) -> None:
    """What the process runs."""
    ChangingLocal(home, events, seed).run(switches)


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass
