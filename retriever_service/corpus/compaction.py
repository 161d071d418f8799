"""From the corpus as SQLite holds it to a new snapshot in its folder."""

import datetime as dt
import threading
from pathlib import Path

import numpy as np

from rag_serving.errors import CancelledByCallerError
from retriever_service.corpus.base import Progress
from retriever_service.errors import BuildError, CompactionError
from retriever_service.index import snapshot
from retriever_service.index.faiss_index import FaissBuilder
from retriever_service.index.manifest import Manifest
from retriever_service.index.recipe import RECIPE_FILE, knobs_text
from retriever_service.store.live import LiveStore
from retriever_service.types import Float32Array, Int64Array

# Few: searches wait for the interpreter while Python takes them apart.
_VECTORS_PER_CHUNK = 1000
_TRAINING_SEED = 0


def write_snapshot(
    root: Path,
    store: LiveStore,
    serving: Manifest,
    base_generation: int,
    knobs: dict[str, int],
    progress: Progress,
    cancelled: threading.Event,
    *,
    keep: int,
) -> snapshot.Snapshot:
    """Builds an index of the documents as they are now, in the kind that serves, and makes it current.

    `knobs` are the index's own nprobe and ef_search. Raises CompactionError, CancelledByCallerError, or OSError
    where the disk fails; then nothing is left of it.
    """
    sequence, rows = store.rows_now()
    if not len(rows):
        raise CompactionError("every document is deleted: there is nothing to write")
    try:
        with snapshot.compacting(root) as work:
            index_file = work / snapshot.INDEX_FILE
            _write_index(store, rows, serving, index_file, knobs, progress, cancelled)
            progress("publish", 0, 1)
            np.save(work / snapshot.ROWS_FILE, rows, allow_pickle=False)
            (work / RECIPE_FILE).write_text(knobs_text(**knobs), encoding="utf-8")
            manifest = Manifest(
                generation=snapshot.next_generation(root),
                created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                created_by=serving.created_by,
                kind=serving.kind,
                metric=serving.metric,
                dimension=serving.dimension,
                ntotal=len(rows),
                embedding=serving.embedding,
                files=snapshot.file_entries(work, (snapshot.INDEX_FILE, snapshot.ROWS_FILE)),
                base_generation=base_generation,
                sequence=sequence,
            )
            _check(cancelled)
            return snapshot.publish(work, root, manifest, keep=keep)
    except BuildError as error:
        raise CompactionError(error.message) from error


def _write_index(
    store: LiveStore,
    rows: Int64Array,
    serving: Manifest,
    file: Path,
    knobs: dict[str, int],
    progress: Progress,
    cancelled: threading.Event,
) -> None:
    builder = FaissBuilder(serving.kind, serving.dimension, serving.metric)
    if builder.needs_training:
        progress("train", 0, 1)
        builder.train(_sample(store, rows, builder.num_training_vectors))
    done = 0
    progress("index", done, len(rows))
    for vectors in store.embeddings_in_chunks(rows, _VECTORS_PER_CHUNK):
        _check(cancelled)
        builder.add(vectors)
        done += len(vectors)
        progress("index", done, len(rows))
    _check(cancelled)
    builder.save(file, **knobs)


def _sample(store: LiveStore, rows: Int64Array, size: int) -> Float32Array:
    if len(rows) > size:
        rows = np.sort(np.random.default_rng(_TRAINING_SEED).choice(rows, size=size, replace=False))
    return store.many_embeddings(rows, _VECTORS_PER_CHUNK)


def _check(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise CancelledByCallerError("the operation was cancelled")
