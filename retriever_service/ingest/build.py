"""Builds a generation of an index: documents into SQLite, from them the faiss index, then publish."""

import datetime as dt
import importlib.metadata
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from retriever_service.errors import BuildError
from retriever_service.index import snapshot
from retriever_service.index.faiss_index import FaissBuilder, FaissIndex, normalized_kind
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.ingest.reader import CorpusReader
from retriever_service.ingest.records import Record
from retriever_service.store.sqlite import DuplicateKeyError, SqliteStore, SqliteWriter
from retriever_service.types import Float32Array, Metric

_RECORDS_PER_CHUNK = 512
_VECTORS_PER_CHUNK = 16_384
_TRAINING_SEED = 0


class Encoder(Protocol):
    """What a build needs of a passage encoder."""

    def description(self) -> Embedding:
        """How the vectors are made."""

    def encode(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        """Returns float32 [len, dim] for (title, text) pairs."""


class Progress(Protocol):
    """Hears how a build goes on."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` documents, None where that is not known, are through `stage`."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build. `nprobe` and `ef_search` become the index's own settings, where its kind has them."""

    kind: str = "Flat"
    metric: Metric = Metric.INNER_PRODUCT
    nprobe: int = 16
    ef_search: int = 64
    keep_generations: int = 2
    faiss_file: Path | None = None


def build_index(
    reader: CorpusReader,
    folder: Path,
    *,
    encoder: Encoder | None,
    embedding_name: str | None,
    options: BuildOptions,
    progress: Progress,
) -> snapshot.Snapshot:
    """Builds the next generation in `folder` and makes it current; killed at any moment, the old one stays.

    The corpus brings its embeddings along, whose model is then `embedding_name`, or `encoder` makes them.
    Memory holds a chunk of documents and the faiss index, whatever the size of the corpus. Raises BuildError.
    """
    with snapshot.building(folder) as work:
        dimension = _write_documents(reader, work / snapshot.DOCUMENTS_FILE, encoder, progress)
        store = SqliteStore(work / snapshot.DOCUMENTS_FILE, dimension)
        try:
            if options.faiss_file is None:
                kind, metric = _build_vectors(store, work / snapshot.INDEX_FILE, dimension, options, progress)
            else:
                kind, metric = _adopt_vectors(
                    options.faiss_file, work / snapshot.INDEX_FILE, dimension, len(store)
                )
        finally:
            store.close()
        progress("publish", 0, 1)
        manifest = Manifest(
            generation=snapshot.next_generation(folder),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            created_by=_created_by(),
            kind=kind,
            metric=metric,
            dimension=dimension,
            ntotal=len(store),
            embedding=_embedding(encoder, embedding_name),
            files=snapshot.file_entries(work),
        )
        published = snapshot.publish(work, folder, manifest, keep=options.keep_generations)
        progress("publish", 1, 1)
        return published


def _write_documents(reader: CorpusReader, file: Path, encoder: Encoder | None, progress: Progress) -> int:
    """Writes documents and embeddings, chunk by chunk; returns the dimension."""
    writer = SqliteWriter(file)
    total = reader.count()
    progress("documents", 0, total)
    dimension: int | None = None
    try:
        for chunk in _chunks(reader, _RECORDS_PER_CHUNK):
            embeddings = _embeddings(chunk, encoder, dimension)
            dimension = embeddings.shape[1]
            documents = [
                (
                    record.key if record.key is not None else str(row),
                    record.title,
                    record.text,
                    record.metadata,
                )
                for row, record in enumerate(chunk, start=len(writer))
            ]
            writer.append(documents, embeddings)
            progress("documents", len(writer), total)
        if dimension is None:
            raise BuildError(f"{reader.path}: no documents")
        writer.finish()
    except DuplicateKeyError as error:
        first, second = reader.nth(error.first_row).where, reader.nth(error.second_row).where
        raise BuildError(f"{second}: key {error.key!r} is already taken by {first}") from error
    finally:
        writer.close()
    return dimension


def _embeddings(chunk: list[Record], encoder: Encoder | None, dimension: int | None) -> Float32Array:
    if encoder is not None:
        return encoder.encode([(record.title, record.text) for record in chunk])
    given: list[Float32Array] = []
    for record in chunk:
        if record.embedding is None:
            raise BuildError(f"{record.where}: no embedding: give --embedding-model to make them")
        dimension = dimension or len(record.embedding)
        if len(record.embedding) != dimension:
            raise BuildError(
                f"{record.where}: embedding has dimension {len(record.embedding)},"
                f" those before have {dimension}"
            )
        given.append(record.embedding)
    return np.stack(given)


def _build_vectors(
    store: SqliteStore, file: Path, dimension: int, options: BuildOptions, progress: Progress
) -> tuple[str, Metric]:
    kind = normalized_kind(options.kind)
    builder = FaissBuilder(kind, dimension, options.metric)
    if builder.needs_training:
        progress("train", 0, 1)
        builder.train(_sample(store, builder.num_training_vectors))
        progress("train", 1, 1)
    done = 0
    for vectors in store.embedding_chunks(_VECTORS_PER_CHUNK):
        builder.add(vectors)
        done += len(vectors)
        progress("index", done, len(store))
    builder.save(file, nprobe=options.nprobe, ef_search=options.ef_search)
    return kind, options.metric


def _adopt_vectors(source: Path, file: Path, dimension: int, num_documents: int) -> tuple[str, Metric]:
    """Takes over a faiss file made elsewhere, for example by datasets' `save_faiss_index`."""
    if not source.is_file():
        raise BuildError(f"no faiss file at {source}")
    index = FaissIndex.load(source)
    if (index.dimension, index.ntotal) != (dimension, num_documents):
        raise BuildError(
            f"{source} holds {index.ntotal} vectors of dimension {index.dimension},"
            f" the corpus {num_documents} of dimension {dimension}"
        )
    shutil.copyfile(source, file)
    return index.kind(), index.metric


def _sample(store: SqliteStore, size: int) -> Float32Array:
    """Returns `size` embeddings, or all, drawn evenly; the same on every build of the same corpus."""
    if len(store) <= size:
        rows = np.arange(len(store))
    else:
        rows = np.random.default_rng(_TRAINING_SEED).choice(len(store), size=size, replace=False)
    return store.embeddings_of(np.sort(rows).tolist())


def _embedding(encoder: Encoder | None, name: str | None) -> Embedding:
    if encoder is not None:
        return encoder.description()
    if not name:
        raise BuildError("the corpus brings its embeddings: say with --embedding-model-name whose they are")
    return Embedding(name=name)


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _created_by() -> str:
    try:
        return f"ragpair {importlib.metadata.version('ragpair')}"
    except importlib.metadata.PackageNotFoundError:
        return "ragpair (not installed)"
