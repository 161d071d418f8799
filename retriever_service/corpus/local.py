"""The corpus of an index folder: SQLite holds the truth, faiss snapshots and a fresh segment are derived."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rag_serving.errors import AbortedError
from retriever_service.corpus import lock
from retriever_service.corpus.base import (
    Corpus,
    Delete,
    Deleted,
    Generation,
    Page,
    Progress,
    Upsert,
    Upserted,
)
from retriever_service.corpus.compaction import write_snapshot
from retriever_service.errors import CompactionError, DamagedIndexError, DiskFullError, ReadOnlyError
from retriever_service.index.base import VectorIndex
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.live_index import LiveIndex
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import DOCUMENTS_FILE, Snapshot, live_file, prune
from retriever_service.store.changes import ChangeWriter
from retriever_service.store.live import LiveStore, LoggedChange
from retriever_service.store.live_check import check_changes, check_last_change, is_begun
from retriever_service.types import Float32Array, Int64Array

_VECTORS_PER_CHUNK = 16_384
_ATTEMPTS = 3
# How long another process may take to see a change: until then it finds, and reads, what was replaced.
_PURGE_GRACE_S = 3600.0


class LocalCorpus(Corpus):
    """The newest build of a folder with its changes; a later build is another LocalCorpus.

    One lock orders the changes: what is written to SQLite first is shown to searches first. Readers take none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        load_index: Callable[[Path], VectorIndex] = FaissIndex.load,
        verify: bool = True,
        number_offset: int = 0,
        generations_kept: int = 2,
        requests_kept: int = 100_000,
        take_changes: bool = True,
    ) -> None:
        """Opens a folder, or one generation of it, which takes no changes.

        `number_offset` is added to the generation of the folder. Raises MissingIndexError, DamagedIndexError
        or DiskFullError.
        """
        self.folder = folder
        self._load_index = load_index
        self._verify = verify
        self._offset = number_offset
        self._generations_kept = generations_kept
        self._closing = contextlib.ExitStack()
        self._holds: dict[int, contextlib.ExitStack] = {}
        self._indexes: dict[int, LiveIndex] = {}
        self._generations: dict[int, Generation] = {}  # the newest last
        self._lock = threading.RLock()
        self._writer: ChangeWriter | None = None
        self._generation: Generation
        self._index: LiveIndex
        try:
            self._open(requests_kept, take_changes)
        except BaseException:
            self.close()
            raise

    @property
    def generation(self) -> Generation:
        """The newest generation."""
        return self._generation

    @property
    def read_only_reason(self) -> str | None:
        """Why changes are refused; None where they are taken."""
        return self._read_only_reason

    @property
    def sequence(self) -> int:
        """Number of the last change that searches see."""
        return self._store.shown

    @property
    def pending_changes(self) -> int:
        """Vectors hidden or added since the newest snapshot."""
        return self._index.pending_changes

    def has_newest_build(self) -> bool:
        """Whether the folder still names a snapshot of the build that this corpus has open."""
        manifest, base = Snapshot.open(self.folder).manifest, self._base.manifest
        return manifest == base or manifest.base_generation == base.generation

    def upsert(self, batch: Upsert) -> Upserted:
        """Writes a batch: see Corpus."""
        documents = [(one.key, one.title, one.text, one.metadata, one.etag) for one in batch.documents]
        manifest = self._generation.manifest
        if (batch.embedding, batch.embeddings.shape[1]) != (manifest.embedding, manifest.dimension):
            raise AbortedError(
                "another index was activated meanwhile: send the batch again", reason="INDEX_CHANGED"
            )
        with self._lock:
            answer, changes = self._checked_writer().upsert(
                (batch.request_id, batch.digest),
                documents,
                batch.embeddings,
                create_only=batch.create_only,
            )
            if changes:
                self._show(changes, batch.embeddings)
        return Upserted(**answer)

    def delete(self, batch: Delete) -> Deleted:
        """Deletes a batch: see Corpus."""
        with self._lock:
            answer, changes = self._checked_writer().delete(
                (batch.request_id, batch.digest), batch.references
            )
            if changes:
                self._show(changes, np.empty((0, self._generation.index.dimension), np.float32))
        return Deleted(**answer)

    def page(self, after_key: str | None, size: int) -> Page:
        """Returns documents by key: see Corpus."""
        found = self._store.page(after_key, size + 1)
        return Page(found[:size], more=len(found) > size)

    def compact(self, progress: Progress, cancelled: threading.Event) -> Generation:
        """Writes, opens and returns a new snapshot: see Corpus."""
        self._checked_writer()
        if self._root is None or not self.has_newest_build():
            raise CompactionError(
                f"{self.folder} names another build than the one that serves: activate that one first"
            )
        try:
            written = write_snapshot(
                self._root,
                self._store,
                self._generation.manifest,
                self._base.manifest.generation,
                self._index.settings(),
                progress,
                cancelled,
                keep=max(2, self._generations_kept),
            )
            progress("load", 0, 1)
            return self._open_generation(written)
        except OSError as error:
            raise DiskFullError(f"{self._root}: {error}", retry_after_s=5.0) from error

    def renumber(self, number: int) -> Generation:
        """Returns the folder's newest generation under a number that no other has, and counts on from there.

        It must be of this build. Raises MissingIndexError, DamagedIndexError.
        """
        snapshot = Snapshot.open(self.folder)
        if snapshot.manifest != self._generation.manifest:
            # One that was written and never opened, as where a compaction failed behind its last step.
            return self._open_generation(snapshot, number)
        hold = contextlib.ExitStack()
        hold.enter_context(snapshot.held())
        with self._lock:
            return self._make_newest(number, self._index, snapshot.manifest, hold)

    def open_newer(self) -> Generation | None:
        """Opens the snapshot that another process has compacted this corpus into; None where there is none.

        Raises MissingIndexError, DamagedIndexError.
        """
        snapshot = Snapshot.open(self.folder)
        is_newer = snapshot.manifest.generation > self._generation.manifest.generation
        if not is_newer or snapshot.manifest.base_generation != self._base.manifest.generation:
            return None
        # Its rows are of changes that may have begun since this corpus was opened.
        self.follow()
        return self._open_generation(snapshot)

    def follow(self) -> bool:
        """Shows searches what another process has written since: see Corpus."""
        if self._writer is not None:
            return False
        with self._lock:
            if not self._store.has_changes_file and not self._find_changes():
                return False
            changes = self._store.changes_after(self._store.shown)
            if not changes:
                return False
            for index in set(self._indexes.values()):
                self._catch_up(index, changes)
            self._store.shown = changes[-1].sequence
            return True

    def release(self, generation: Generation) -> None:
        """Forgets a generation: see Corpus. Where it is the newest, and never came to serve, the one before is."""
        with self._lock:
            self._generations.pop(generation.number, None)
            if self._generations and generation.number == self._generation.number:
                self._go_on_from(next(reversed(self._generations)))
            index = self._indexes.pop(generation.number, None)
            hold = self._holds.pop(generation.number, None)
            is_unused = index not in self._indexes.values()
        if index is not None and is_unused:
            index.close()
        if hold is not None:
            hold.close()
        if self._writer is not None and self._root is not None:
            with contextlib.suppress(OSError):
                prune(self._root, keep=max(2, self._generations_kept))

    def close(self) -> None:
        """Closes everything: see Corpus."""
        with self._lock:  # the last generations leave together, each in a thread
            for index in set(self._indexes.values()):
                index.close()
            for hold in self._holds.values():
                hold.close()
            self._indexes.clear()
            self._generations.clear()
            with contextlib.suppress(AttributeError):  # nothing was opened
                # Who keeps a corpus that is closed keeps no index by it.
                del self._generation, self._index
            self._holds.clear()
            self._closing.close()

    def _open(self, requests_kept: int, take_changes: bool) -> None:
        snapshot, base = self._hold_newest()
        self._root = snapshot.root
        self._base = base
        digest = base.manifest.digest()
        etag_prefix = digest.removeprefix("sha256:")[:8]
        if self._verify:
            base.verify((DOCUMENTS_FILE,))
        changes_file = None if self._root is None else live_file(self._root, self._base.manifest.generation)
        self._read_only_reason = self._refusal(take_changes)
        if changes_file is not None:
            self._check_changes(changes_file, snapshot, base)
        if self._read_only_reason is None and changes_file is not None:
            self._writer = ChangeWriter(changes_file, base.documents_file, digest, etag_prefix, requests_kept)
            self._closing.callback(self._writer.close)
            self._writer.purge(grace_s=_PURGE_GRACE_S)
        elif changes_file is not None and not is_begun(changes_file, base.documents_file):
            changes_file = None
        dimension = base.manifest.dimension
        self._store = LiveStore(base.documents_file, changes_file, dimension, etag_prefix)
        self._closing.callback(self._store.close)
        if base.manifest.ntotal != self._store.num_built:
            raise DamagedIndexError(
                base.documents_file, f"{self._store.num_built} documents, not {base.manifest.ntotal}"
            )
        self._open_generation(snapshot)

    def _find_changes(self) -> bool:
        """Looks for changes of a build that had none when it was opened; returns whether there are now."""
        if self._root is None:
            return False
        file = live_file(self._root, self._base.manifest.generation)
        if not is_begun(file, self._base.documents_file):
            return False
        self._check_changes(file, self._base, self._base)
        self._store.read_changes(file)
        return True

    def _check_changes(self, file: Path, snapshot: Snapshot, base: Snapshot) -> None:
        """Refuses a changes file that is damaged; unless `verify`, only one that is gone, wholly or at its end."""
        sequence = snapshot.manifest.sequence
        if self._verify:
            check_changes(
                file,
                base.documents_file,
                base.manifest.digest(),
                base.manifest.dimension,
                sequence,
            )
        else:
            check_last_change(file, base.documents_file, is_compacted=sequence > 0)

    def _refusal(self, take_changes: bool) -> str | None:
        if not take_changes:
            return "this retriever was started with --read-only"
        if self._root is None or self.folder.resolve() != self._root.resolve():
            return f"{self.folder} is one generation: only an index folder takes changes"
        try:
            lock.acquire(self._root)
        except ReadOnlyError as error:
            return error.message
        self._closing.callback(lock.release, self._root)
        return None

    def _hold_newest(self) -> tuple[Snapshot, Snapshot]:
        """Returns the folder's snapshot and the build it goes back to, the latter kept until `close`."""
        for attempt in range(_ATTEMPTS):
            snapshot = Snapshot.open(self.folder)
            try:
                base = snapshot.base()
                self._closing.enter_context(base.held())
            except (OSError, DamagedIndexError):
                if attempt == _ATTEMPTS - 1 or Snapshot.open(self.folder).manifest == snapshot.manifest:
                    raise
            else:
                return snapshot, base
        raise AssertionError("unreachable")

    def _open_generation(self, snapshot: Snapshot, number: int | None = None) -> Generation:
        """Loads a snapshot's index and brings it up to now: the newest generation, under this number or the next."""
        manifest = snapshot.manifest
        hold = contextlib.ExitStack()
        with contextlib.ExitStack() as failed:
            failed.callback(hold.close)
            hold.enter_context(snapshot.held())
            if self._verify:
                snapshot.verify()
            index = LiveIndex(self._load_index(snapshot.index_file), _rows_of(snapshot))
            failed.callback(index.close)
            _check_fits(index.base, snapshot)
            with self._lock:
                shown = self._store.shown if self._indexes else manifest.sequence
                changes = self._store.changes_after(min(shown, manifest.sequence))
                # Another process may have written what the indexes here have not seen: all go on from one change.
                unseen = [one for one in changes if one.sequence > shown]
                for other in set(self._indexes.values()) if unseen else ():
                    self._catch_up(other, unseen)
                self._catch_up(index, [one for one in changes if one.sequence > manifest.sequence])
                last = changes[-1].sequence if changes else 0
                self._store.shown = max(self._store.shown, manifest.sequence, last)
                if number is None:
                    number = manifest.generation + self._offset
                generation = self._make_newest(number, index, manifest, hold)
            failed.pop_all()
        return generation

    def _make_newest(
        self, number: int, index: LiveIndex, manifest: Manifest, hold: contextlib.ExitStack
    ) -> Generation:
        self._indexes[number] = index
        self._holds[number] = hold
        self._generations[number] = Generation(number, index, self._store, manifest)
        self._go_on_from(number)
        return self._generation

    def _go_on_from(self, number: int) -> None:
        """Makes a generation that is open the newest."""
        self._generation, self._index = self._generations[number], self._indexes[number]
        self._offset = number - self._generation.manifest.generation

    def _catch_up(self, index: LiveIndex, changes: list[LoggedChange]) -> None:
        """Applies what is left of the changes once they cancel each other out.

        A new version and the one that it replaces change places at once: a search finds either.
        """
        deleted: list[int] = []
        replaced: dict[int, int | None] = {}  # by the row of what is left to add
        for change in changes:
            old = change.replaced_row
            if old in replaced:
                old = replaced.pop(old)
            if change.row is not None:
                replaced[change.row] = old
            elif old is not None:
                deleted.append(old)
        index.change(deleted, [], np.empty((0, index.dimension), np.float32))
        written = list(replaced)
        start = 0
        for vectors in self._store.embeddings_in_chunks(np.asarray(written, np.int64), _VECTORS_PER_CHUNK):
            rows = written[start : start + len(vectors)]
            hidden = [old for old in map(replaced.get, rows) if old is not None]
            index.change(hidden, rows, vectors)
            start += len(vectors)

    def _show(self, changes: list[LoggedChange], embeddings: Float32Array) -> None:
        """Lets searches see changes that are durable."""
        hidden = [change.replaced_row for change in changes if change.replaced_row is not None]
        rows = [change.row for change in changes if change.row is not None]
        for index in set(self._indexes.values()):
            index.change(hidden, rows, embeddings)
        self._store.shown = changes[-1].sequence

    def _checked_writer(self) -> ChangeWriter:
        if self._writer is None:
            raise ReadOnlyError(f"no changes here: {self._read_only_reason}")
        return self._writer


def _check_fits(index: VectorIndex, snapshot: Snapshot) -> None:
    manifest = snapshot.manifest
    if (index.ntotal, index.dimension, index.metric) != (
        manifest.ntotal,
        manifest.dimension,
        manifest.metric,
    ):
        raise DamagedIndexError(snapshot.index_file, "ntotal, dimension or metric are not the manifest's")


def _rows_of(snapshot: Snapshot) -> Int64Array | None:
    if snapshot.manifest.base_generation is None:
        return None
    try:
        rows: Int64Array = np.load(snapshot.rows_file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DamagedIndexError(snapshot.rows_file, f"numpy cannot read it: {error}") from error
    if rows.dtype != np.int64 or rows.shape != (snapshot.manifest.ntotal,) or not (np.diff(rows) > 0).all():
        raise DamagedIndexError(snapshot.rows_file, "is not the ascending rows of the index")
    return rows
