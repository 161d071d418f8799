"""Builds a damaged snapshot anew from what SQLite holds."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from retriever_service.corpus import lock
from retriever_service.corpus.base import Progress
from retriever_service.corpus.compaction import write_snapshot
from retriever_service.errors import BuildError, DamagedIndexError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.recipe import recorded_knobs
from retriever_service.index.snapshot import DOCUMENTS_FILE, INDEX_FILE, Snapshot, live_file
from retriever_service.ingest.vectors import DEFAULT_EF_SEARCH, DEFAULT_NPROBE
from retriever_service.ingest.verify import verify_index
from retriever_service.store.acknowledged import Acknowledged, LostChangesError
from retriever_service.store.live import LiveStore
from retriever_service.store.live_check import check_changes, is_begun

_GENERATIONS_KEPT = 2


def repair_index(
    folder: Path,
    *,
    nprobe: int | None,
    ef_search: int | None,
    step: Callable[[str], None],
    progress: Progress,
) -> tuple[Snapshot, bool]:
    """Makes an index folder whole again; returns its snapshot, and whether there was anything to repair.

    The index is built from the documents and every change since, in the kind it had, as a new generation with
    `nprobe` and `ef_search` as its own settings, those it was built with where they are None. Acknowledged changes
    that are gone from the log's end are given up. Raises DamagedIndexError where the manifest or SQLite's files
    are damaged themselves, ReadOnlyError while a retriever writes to the folder, and BuildError.
    """
    try:
        return _repair(folder, nprobe, ef_search, step, progress)
    except LostChangesError as error:
        step(f"what is left, for {error.message}")
        _give_up_lost_changes(Snapshot.open(folder), error.last)
        return _repair(folder, nprobe, ef_search, step, progress)[0], True


def _repair(
    folder: Path, nprobe: int | None, ef_search: int | None, step: Callable[[str], None], progress: Progress
) -> tuple[Snapshot, bool]:
    try:
        return verify_index(folder, step), False
    except LostChangesError:
        raise
    except DamagedIndexError as error:
        step(f"what is left, for {error.message}")
    damaged = Snapshot.open(folder, (DOCUMENTS_FILE,))
    root = damaged.root
    if root is None or folder.resolve() != root.resolve():
        raise BuildError(f"{folder} is no index folder with generations: build it anew")
    base = damaged.base()
    base.verify((DOCUMENTS_FILE,))
    lock.acquire(root)
    try:
        changes = live_file(root, base.manifest.generation)
        check_changes(
            changes,
            base.documents_file,
            base.manifest.digest(),
            base.manifest.dimension,
            damaged.manifest.sequence,
        )
        built = _knobs(damaged, base)
        etag_prefix = base.manifest.digest().removeprefix("sha256:")[:8]
        store = LiveStore(
            base.documents_file,
            changes if is_begun(changes, base.documents_file) else None,
            base.manifest.dimension,
            etag_prefix,
        )
        with base.held(), contextlib.closing(store):
            write_snapshot(
                root,
                store,
                damaged.manifest,
                base.manifest.generation,
                {"nprobe": nprobe or built["nprobe"], "ef_search": ef_search or built["ef_search"]},
                progress,
                threading.Event(),
                keep=_GENERATIONS_KEPT,
            )
    finally:
        lock.release(root)
    return verify_index(folder, step), True


def _knobs(damaged: Snapshot, base: Snapshot) -> dict[str, int]:
    """Returns nprobe and ef_search of a damaged snapshot: its index file's, if that is whole, or recorded ones."""
    with contextlib.suppress(DamagedIndexError, OSError):
        damaged.verify((INDEX_FILE,))
        return FaissIndex.load(damaged.index_file).settings()
    default = {"nprobe": DEFAULT_NPROBE, "ef_search": DEFAULT_EF_SEARCH}
    return recorded_knobs(damaged.folder) or recorded_knobs(base.folder) or default


def _give_up_lost_changes(snapshot: Snapshot, last: int) -> None:
    if snapshot.root is None:
        raise BuildError(f"{snapshot.folder} is no index folder with generations: build it anew")
    lock.acquire(snapshot.root)
    try:
        noted = Acknowledged(live_file(snapshot.root, snapshot.base().manifest.generation))
        noted.write(last)
        noted.close()
    finally:
        lock.release(snapshot.root)
