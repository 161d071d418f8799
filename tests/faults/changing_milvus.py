"""A process that changes a corpus in Milvus until it is killed."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import pymilvus  # noqa: F401  (here, so that processes have it when they start)

from rag_serving.errors import UnavailableError
from retriever_service.corpus.base import Corpus
from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary
from tests.faults.changing_corpus import ChangingCorpus

LEASE_S = 2.0
NAME = "killed"
_TIMEOUT_S = 10.0
_CHANGES_PER_LOOK = 5

AnswerT = TypeVar("AnswerT")


def open_library(uri: str) -> MilvusLibrary:
    """Opens the library, as a retriever does."""
    return MilvusLibrary(MilvusAddress(uri, timeout_s=_TIMEOUT_S), NAME, lease_s=LEASE_S)


class ChangingMilvus(ChangingCorpus):
    """In the collections of a corpus."""

    def __init__(self, uri: str, folders: Sequence[str], events: Connection, seed: int) -> None:
        self._library = open_library(uri)
        corpus = self._library.active()
        corpus._grace_s = 0.05
        super().__init__(corpus, folders, events, seed)

    def _done(self, work: Callable[[Corpus], AnswerT]) -> AnswerT:
        if self._count % _CHANGES_PER_LOOK == 0:
            self._corpus.follow()  # which also deletes what was replaced
        return work(self._corpus)

    def _activated(self, folder: Path) -> None:
        quiet, never = (lambda *_: None), threading.Event()
        number = self._library.next_number()
        corpus, generation = self._library.open(folder, number, [self._corpus], quiet, never)
        with self._changing:
            self._library.remember(corpus, generation)
            self._corpus = corpus


def change_until_killed(
    uri: str, folders: Sequence[str], events: Connection, seed: int, switches: bool
) -> None:
    """What the process runs; where Milvus is gone it stays as it is."""
    with contextlib.suppress(UnavailableError):
        ChangingMilvus(uri, folders, events, seed).run(switches)
    threading.Event().wait()
