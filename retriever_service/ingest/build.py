"""Builds a generation of an index: documents into SQLite, from them the faiss index, then publish."""

import contextlib
import datetime as dt
import hashlib
import importlib.metadata
import itertools
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from retriever_service.embedding_rule import first_refused
from retriever_service.errors import BuildError, DamagedIndexError
from retriever_service.index import snapshot
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.index.recipe import RECIPE_FILE
from retriever_service.ingest.reader import CorpusReader
from retriever_service.ingest.records import Record
from retriever_service.ingest.vectors import (
    DEFAULT_EF_SEARCH,
    DEFAULT_NPROBE,
    Progress,
    VectorOptions,
    adopt_vectors,
    build_vectors,
)
from retriever_service.store.sqlite import (
    EMBEDDING_DTYPES,
    DuplicateKeyError,
    SqliteStore,
    SqliteWriter,
    meaning,
    stored_dimension,
)
from retriever_service.types import Float32Array, Metric

logger = logging.getLogger(__name__)

RECORDS_PER_CHUNK = 512
"""Documents that are embedded and committed together. A killed build goes on at a chunk's border, so that it
embeds the same passages together as one that was not."""

_MAX_FLOAT16 = float(np.finfo(np.float16).max)


class Encoder(Protocol):
    """What a build needs of a passage encoder."""

    def description(self) -> Embedding:
        """How the vectors are made."""

    def encode(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        """Returns float32 [len, dim] for (title, text) pairs."""


@runtime_checkable
class CorpusEncoder(Protocol):
    """An encoder that reads the corpus itself, for example on many machines."""

    def description(self) -> Embedding:
        """How the vectors are made."""

    def encode_corpus(self, corpus: CorpusReader, first_row: int) -> Iterator[Float32Array]:
        """Yields float32 [RECORDS_PER_CHUNK or, last, less, dim] for the corpus's chunks from first_row on."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build. `nprobe` and `ef_search` become the index's own settings, where its kind has them.

    None is 16 and 64, or what `faiss_file` has.
    `embeddings_dtype` is what SQLite stores, float32 or float16; the index is built from what is stored. Filters
    on the fields of `filter_indexes` are answered from an index of their own.
    """

    kind: str = "Flat"
    metric: Metric = Metric.INNER_PRODUCT
    nprobe: int | None = None
    ef_search: int | None = None
    keep_generations: int = 2
    faiss_file: Path | None = None
    embeddings_dtype: str = "float32"
    checkpoint_s: float = 60.0
    filter_indexes: tuple[str, ...] = ()

    def vectors(self) -> VectorOptions:
        """The part that the faiss index is built by."""
        nprobe, ef_search = self.nprobe or DEFAULT_NPROBE, self.ef_search or DEFAULT_EF_SEARCH
        return VectorOptions(self.kind, self.metric, nprobe, ef_search, self.checkpoint_s)


def build_index(
    reader: CorpusReader,
    folder: Path,
    *,
    encoder: Encoder | CorpusEncoder | None,
    embedding_name: str | None,
    options: BuildOptions,
    progress: Progress,
) -> snapshot.Snapshot:
    """Builds the next generation in `folder` and makes it current; killed at any moment, the old one stays.

    The corpus brings its embeddings along, whose model is then `embedding_name`, or `encoder` makes them.
    A build of the same corpus with the same encoder goes on where one was killed, or failed. Memory holds a chunk
    of documents and the faiss index, whatever the size of the corpus. Raises BuildError.
    """
    embedding = _embedding(encoder, embedding_name)
    recipe = _recipe(reader, embedding, options)
    with snapshot.building(folder, recipe) as work:
        finished = snapshot.unpublished(folder, recipe)
        if finished is not None and _indexed_as(finished.folder, options):
            shutil.rmtree(work)
            return snapshot.make_current(finished, folder, keep=options.keep_generations)
        documents_file = work / snapshot.DOCUMENTS_FILE
        if not documents_file.exists():
            _write_documents(reader, documents_file, encoder, options, progress)
        dimension = stored_dimension(documents_file, options.embeddings_dtype)
        with contextlib.closing(SqliteStore(documents_file, dimension)) as store:
            kind, metric = _index_vectors(store, work / snapshot.INDEX_FILE, dimension, options, progress)
        progress("publish", 0, 1)
        manifest = Manifest(
            generation=snapshot.next_generation(folder),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            created_by=_created_by(),
            kind=kind,
            metric=metric,
            dimension=dimension,
            ntotal=len(store),
            embedding=embedding,
            files=snapshot.file_entries(work),
        )
        published = snapshot.publish(work, folder, manifest, keep=options.keep_generations)
        progress("publish", 1, 1)
        return published


def _write_documents(
    reader: CorpusReader,
    file: Path,
    encoder: Encoder | CorpusEncoder | None,
    options: BuildOptions,
    progress: Progress,
) -> None:
    """Writes documents and embeddings, chunk by chunk, those that a killed build has not; then names the file.

    Whatever fails, what is written stays: the machine may do better next time, and a corrected corpus begins anew.
    """
    unfinished = file.with_name(file.name + ".unfinished")
    total = reader.count()
    writer: SqliteWriter | None = None
    try:
        writer = _writer(unfinished, options.embeddings_dtype)
        progress("documents", len(writer), total)
        for chunk, embeddings in _embedded(reader, len(writer), encoder, writer.dimension):
            _check_stored(chunk, embeddings, options.embeddings_dtype)
            documents = [
                (str(row) if record.key is None else record.key, record.title, record.text, record.metadata)
                for row, record in enumerate(chunk, start=len(writer))
            ]
            writer.append(documents, embeddings)
            progress("documents", len(writer), total)
        _check_not_empty(writer, reader)
        writer.finish(options.filter_indexes)
        unfinished.rename(file)
    except sqlite3.OperationalError as error:
        raise meaning(error, unfinished, "write") from error
    except sqlite3.DatabaseError as error:
        raise DamagedIndexError(
            unfinished, f"SQLite cannot write it: {error}: remove {file.parent} to build anew"
        ) from error
    except DuplicateKeyError as error:
        first, second = reader.nth(error.first_row).where, reader.nth(error.second_row).where
        raise BuildError(f"{second}: key {error.key!r} is already taken by {first}") from error
    finally:
        if writer is not None:
            writer.close()


def _writer(unfinished: Path, dtype: str) -> SqliteWriter:
    """Opens what a killed build has written, or begins anew where SQLite cannot read it."""
    try:
        return SqliteWriter(unfinished, dtype)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        logger.warning("%s: SQLite cannot read it: %s: the documents are written anew", unfinished, error)
    for file in unfinished.parent.glob(f"{unfinished.name}*"):
        file.unlink()
    return SqliteWriter(unfinished, dtype)


def _check_not_empty(writer: SqliteWriter, reader: CorpusReader) -> None:
    if len(writer) == 0:
        raise BuildError(f"{reader.path}: no documents")


def _embedded(
    reader: CorpusReader, first_row: int, encoder: Encoder | CorpusEncoder | None, dimension: int | None
) -> Iterator[tuple[list[Record], Float32Array]]:
    """Yields the chunks of records from first_row on with their embeddings, float32 [records, dim]."""
    if isinstance(encoder, CorpusEncoder):
        yield from zip(chunks(reader, first_row), encoder.encode_corpus(reader, first_row), strict=True)
        return
    for chunk in chunks(reader, first_row):
        if encoder is None:
            embeddings = _given_embeddings(chunk, dimension)
            dimension = embeddings.shape[1]
        else:
            embeddings = encoder.encode([(record.title, record.text) for record in chunk])
        yield chunk, embeddings


def _given_embeddings(chunk: list[Record], dimension: int | None) -> Float32Array:
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


def _check_stored(chunk: list[Record], embeddings: Float32Array, dtype: str) -> None:
    """Refuses, by name, what cannot be served once it is stored as float32 or float16."""
    if dtype == "float16":
        largest = np.abs(embeddings).max(axis=1)
        for record, value in zip(chunk, largest.tolist(), strict=True):
            if value > _MAX_FLOAT16:
                raise BuildError(f"{record.where}: embedding holds {value:g}, more than float16 can")
    refused = first_refused(embeddings.astype(EMBEDDING_DTYPES[dtype]).astype(np.float32))
    if refused is not None:
        raise BuildError(f"{chunk[refused.position].where}: embedding {refused.reason}")


def _index_vectors(
    store: SqliteStore, file: Path, dimension: int, options: BuildOptions, progress: Progress
) -> tuple[str, Metric]:
    if options.faiss_file is not None:
        return adopt_vectors(
            options.faiss_file,
            file,
            dimension,
            len(store),
            nprobe=options.nprobe,
            ef_search=options.ef_search,
        )
    return build_vectors(store, file, dimension, options.vectors(), progress), options.metric


def _indexed_as(generation: Path, options: BuildOptions) -> bool:
    recipe = generation / RECIPE_FILE
    return (
        options.faiss_file is None
        and recipe.is_file()
        and recipe.read_text(encoding="utf-8") == options.vectors().recipe()
    )


def _embedding(encoder: Encoder | CorpusEncoder | None, name: str | None) -> Embedding:
    if encoder is not None:
        return encoder.description()
    if not name:
        raise BuildError("the corpus brings its embeddings: say with --embedding-model-name whose they are")
    return Embedding(name=name)


def _recipe(reader: CorpusReader, embedding: Embedding, options: BuildOptions) -> str:
    """Returns a digest of all that decides what the documents and their embeddings are."""
    parts = [
        reader.fingerprint(),
        embedding.model_dump(mode="json"),
        options.embeddings_dtype,
        options.filter_indexes,
        _created_by(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chunks(records: Iterable[Record], first_row: int) -> Iterator[list[Record]]:
    """Yields the records from first_row on in lists of RECORDS_PER_CHUNK; the last one may be shorter."""
    iterator = itertools.islice(records, first_row, None)
    while chunk := list(itertools.islice(iterator, RECORDS_PER_CHUNK)):
        yield chunk


def _created_by() -> str:
    try:
        return f"ragpair {importlib.metadata.version('ragpair')}"
    except importlib.metadata.PackageNotFoundError:
        return "ragpair (not installed)"
