"""From the stored embeddings to the faiss file of a generation, in steps that a killed build need not repeat."""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from retriever_service.errors import BuildError, DamagedIndexError
from retriever_service.index.faiss_index import FaissBuilder, FaissIndex, normalized_kind
from retriever_service.index.recipe import RECIPE_FILE, knobs_text
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Float32Array, Metric

logger = logging.getLogger(__name__)

DEFAULT_NPROBE = 16
DEFAULT_EF_SEARCH = 64
_VECTORS_PER_CHUNK = 16_384
_TRAINING_SEED = 0
_PARTIAL_FILE = "partial.faiss"
_UNFINISHED = ".unfinished"
# Of the time that indexing takes, at most a tenth goes to writing down how far it has come.
_WORK_PER_CHECKPOINT = 10


class Progress(Protocol):
    """Hears how a build goes on."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` documents, None where that is not known, are through `stage`."""


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """The faiss index to build; `checkpoint_s` is the least work, in seconds, between two checkpoints."""

    kind: str
    metric: Metric
    nprobe: int
    ef_search: int
    checkpoint_s: float

    def recipe(self) -> str:
        """Returns all that decides what the index file of given embeddings holds."""
        return f"{normalized_kind(self.kind)} {self.metric} {knobs_text(self.nprobe, self.ef_search)}"


def build_vectors(
    store: SqliteStore, file: Path, dimension: int, options: VectorOptions, progress: Progress
) -> str:
    """Writes the index file beside the documents and returns its kind; goes on from a checkpoint beside it.

    An index built with a break is that built without one, byte for byte, as long as faiss uses as many threads.
    Memory holds a chunk of vectors, the training sample and the index. Raises BuildError.
    """
    kind = normalized_kind(options.kind)
    work = file.parent
    _clear_other_recipe(file, options.recipe())
    if not file.exists():
        _build(store, file, FaissBuilder(kind, dimension, options.metric), options, progress)
    for scratch in (*work.glob(f"{_PARTIAL_FILE}*"), *work.glob(f"{file.name}{_UNFINISHED}")):
        scratch.unlink()
    return kind


def _build(
    store: SqliteStore, file: Path, builder: FaissBuilder, options: VectorOptions, progress: Progress
) -> None:
    work = file.parent
    checkpoint = _Checkpoint(builder, work / _PARTIAL_FILE, options.checkpoint_s)
    if not checkpoint.resumed and builder.needs_training:
        progress("train", 0, 1)
        builder.train(_sample(store, builder.num_training_vectors))
        checkpoint.write()
        progress("train", 1, 1)
    progress("index", builder.ntotal, len(store))
    for vectors in store.embedding_chunks(_VECTORS_PER_CHUNK, builder.ntotal):
        builder.add(vectors)
        checkpoint.write_if_due()
        progress("index", builder.ntotal, len(store))
    unfinished = file.with_name(file.name + _UNFINISHED)
    builder.save(unfinished, nprobe=options.nprobe, ef_search=options.ef_search)
    _rename_durably(unfinished, file)


def adopt_vectors(
    source: Path,
    file: Path,
    dimension: int,
    num_documents: int,
    *,
    nprobe: int | None,
    ef_search: int | None,
) -> tuple[str, Metric]:
    """Takes over a faiss file made elsewhere, for example by datasets' `save_faiss_index`.

    `nprobe` and `ef_search` become its own settings of the knobs it has; None leaves what it has. Raises BuildError
    where it does not fit the corpus.
    """
    if not source.is_file():
        raise BuildError(f"no faiss file at {source}")
    index = FaissIndex.load(source)
    if (index.dimension, index.ntotal) != (dimension, num_documents):
        raise BuildError(
            f"{source} holds {index.ntotal} vectors of dimension {index.dimension},"
            f" the corpus {num_documents} of dimension {dimension}"
        )
    if not index.names_rows():
        raise BuildError(
            f"{source} has ids of its own: a vector's id must be its document's row, from 0 to {num_documents - 1}"
        )
    own = index.settings()
    knobs = knobs_text(nprobe or own["nprobe"], ef_search or own["ef_search"])
    _clear_other_recipe(file, f"{source.absolute()} {knobs}")
    index.save(file, nprobe=nprobe, ef_search=ef_search)
    return index.kind(), index.metric


class _Checkpoint:
    """Keeps the index built so far on disk, always whole, and loads it where there is one."""

    def __init__(self, builder: FaissBuilder, file: Path, least_s: float) -> None:
        self._builder = builder
        self._file = file
        self._least_s = least_s
        self._since_s = time.monotonic()
        self._wrote_for_s = 0.0
        self.resumed = file.exists()
        if self.resumed:
            try:
                builder.resume(file)
            except DamagedIndexError as error:
                logger.warning("%s: indexing begins anew", error.message)
                self.resumed = False

    def write_if_due(self) -> None:
        if time.monotonic() - self._since_s >= max(self._least_s, _WORK_PER_CHECKPOINT * self._wrote_for_s):
            self.write()

    def write(self) -> None:
        began_s = time.monotonic()
        unfinished = self._file.with_name(self._file.name + _UNFINISHED)
        self._builder.checkpoint(unfinished)
        _rename_durably(unfinished, self._file)
        self._since_s = time.monotonic()
        self._wrote_for_s = self._since_s - began_s


def _clear_other_recipe(file: Path, recipe: str) -> None:
    """Removes what a build of the same documents, but another index, has left."""
    written = file.parent / RECIPE_FILE
    if written.exists() and written.read_text(encoding="utf-8") == recipe:
        return
    written.unlink(missing_ok=True)
    for left in (file, file.parent / _PARTIAL_FILE):
        left.unlink(missing_ok=True)
    written.write_text(recipe, encoding="utf-8")


def _rename_durably(unfinished: Path, file: Path) -> None:
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    unfinished.replace(file)


def _sample(store: SqliteStore, size: int) -> Float32Array:
    """Returns `size` embeddings, or all, drawn evenly; the same on every build of the same corpus."""
    if len(store) <= size:
        rows = np.arange(len(store))
    else:
        rows = np.random.default_rng(_TRAINING_SEED).choice(len(store), size=size, replace=False)
    return store.many_embeddings(np.sort(rows), _VECTORS_PER_CHUNK)
