"""The contract of a corpus, which is what a backend implements."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from retriever_service.index.base import VectorIndex
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.store.base import DocumentStore
from retriever_service.types import Document, Float32Array


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document to write. `metadata` is a JSON object as text, or None; `etag`, where set, must be stored."""

    key: str
    title: str
    text: str
    metadata: str | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Upsert:
    """A checked batch: distinct keys, embeddings float32 [documents, dim], finite.

    `digest` is its content's; `embedding` is the index's that the batch was checked against."""

    request_id: str
    digest: str
    documents: Sequence[NewDocument]
    embeddings: Float32Array
    create_only: bool
    embedding: Embedding


@dataclass(frozen=True, slots=True)
class Upserted:
    """What became of an upsert, now durable: rows and etags in the batch's order."""

    rows: Sequence[int]
    etags: Sequence[str]
    created: int
    replaced: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Delete:
    """(key, etag or "") of documents to delete, with distinct keys."""

    request_id: str
    digest: str
    references: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Deleted:
    """What became of a delete, now durable."""

    deleted: int
    missing_keys: Sequence[str]
    sequence: int


@dataclass(frozen=True, slots=True)
class Page:
    """Documents by key; `more` says whether there are others behind the last."""

    documents: Sequence[Document]
    more: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """A snapshot and, in index and store, every change since: both answer for the corpus as it is now.

    `number` grows with every snapshot and activation; `manifest` describes the snapshot.
    """

    number: int
    index: VectorIndex
    store: DocumentStore
    manifest: Manifest


class Progress(Protocol):
    """Hears how a long operation goes on."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` documents, None where that is not known, are through `stage`."""


class Corpus(ABC):
    """Documents that can be searched and changed. Methods block, and may be called from many threads.

    What an implementation promises:

    - A change is all or nothing. Its method returns once it is durable, and a search, read or listing that
      begins afterwards, in whichever open generation, sees it: nothing acknowledged is lost, nothing deleted
      is found again.
    - A change whose request_id is remembered is answered with the first answer, and done once.
      RequestIdReusedError where its digest differs.
    - After UnavailableError, which only a corpus that lies elsewhere raises, a change may have been made or not;
      sent again under its request_id it is made once.
    - A compaction changes no answer but for the approximations of the index; changes go on meanwhile.
    """

    folder: Path
    """Where it lies, or what names it."""

    @property
    @abstractmethod
    def generation(self) -> Generation:
        """The newest generation."""

    @property
    @abstractmethod
    def read_only_reason(self) -> str | None:
        """Why changes are refused; None where they are taken."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """Number of the last change that searches see; 0 before the first."""

    @property
    @abstractmethod
    def pending_changes(self) -> int:
        """Documents written or hidden since the newest snapshot."""

    @abstractmethod
    def upsert(self, batch: Upsert) -> Upserted:
        """Writes a batch.

        Raises ReadOnlyError, EtagError, KeyExistsError, RequestIdReusedError or DiskFullError, and then has
        changed nothing.
        """

    @abstractmethod
    def delete(self, batch: Delete) -> Deleted:
        """Deletes a batch. Raises as `upsert` does."""

    @abstractmethod
    def page(self, after_key: str | None, size: int) -> Page:
        """Returns up to `size` documents whose keys follow `after_key`, in the order of keys."""

    @abstractmethod
    def compact(self, progress: Progress, cancelled: threading.Event) -> Generation:
        """Writes the corpus as it is into a new snapshot, opens it and returns it.

        Raises ReadOnlyError, CompactionError, DiskFullError, or CancelledByCallerError once `cancelled` is set;
        the snapshots of before stay.
        """

    @abstractmethod
    def follow(self) -> bool:
        """Shows searches what another process has written; returns whether there was anything.

        Called again and again. Raises UnavailableError where the corpus cannot be reached.
        """

    @abstractmethod
    def release(self, generation: Generation) -> None:
        """Lets go of a generation that no search uses any more."""

    @abstractmethod
    def close(self) -> None:
        """Closes everything; nothing may be called afterwards."""


class CorpusLibrary(ABC):
    """What can be activated, and what is active: index folders become corpora. Methods block."""

    @property
    @abstractmethod
    def refused(self) -> str | None:
        """Why nothing can be activated; None where it can."""

    @abstractmethod
    def manifest(self, folder: Path) -> Manifest:
        """Reads what a folder holds, before it is opened. Raises FailedPreconditionError, DamagedIndexError."""

    @abstractmethod
    def open(
        self,
        folder: Path,
        number: int,
        serving: Sequence[Corpus],
        progress: Progress,
        cancelled: threading.Event,
    ) -> tuple[Corpus, Generation]:
        """Opens a folder's corpus and gives its generation that number; one of those that serve is taken as it is.

        Raises as `manifest` and `Corpus.compact` do.
        """

    def newer(self, current: Generation, serving: Sequence[Corpus]) -> tuple[Corpus, Generation] | None:  # noqa: ARG002
        """Opens what another process has moved to since, where this one takes no changes; None where nothing is newer.

        `current` is the last of `serving`'s. Raises as `open` does.
        """
        return None

    @abstractmethod
    def remember(self, corpus: Corpus, generation: Generation) -> None:
        """Writes down, durably and at once, that this is active, so that a restart finds it.

        Raises ReadOnlyError, UnavailableError.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes what the corpora share; they are closed by then."""
