"""From an index folder to a new collection of a corpus."""

import contextlib
import threading
import uuid
from collections.abc import Sequence

from rag_serving.errors import CancelledByCallerError, FailedPreconditionError, InvalidArgumentError
from retriever_service.corpus.base import Progress
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import DOCUMENTS_FILE, Snapshot, live_file
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.entities import entity
from retriever_service.milvus.filter_indexes import create_filter_indexes
from retriever_service.milvus.log import ChangeLog, Facts
from retriever_service.milvus.schema import create_documents
from retriever_service.milvus.state import Checkpoint
from retriever_service.store.live import LiveStore
from retriever_service.store.live_check import check_changes, is_begun

_ROWS_PER_CHUNK = 500
_IMPORT_TIMEOUT_S = 600.0


def source_id(snapshot: Snapshot) -> str:
    """Returns what tells two states of a folder apart: its build, and the last change since."""
    with contextlib.closing(_store_of(snapshot)) as store:
        return f"{snapshot.base().manifest.digest()} {store.rows_now()[0]}"


def import_folder(
    connection: MilvusConnection,
    log: ChangeLog,
    collection: str,
    snapshot: Snapshot,
    number: int,
    progress: Progress,
    cancelled: threading.Event,
    filter_indexes: Sequence[str] = (),
) -> Facts:
    """Writes the documents of a folder, as they are now, to a collection that is not there yet.

    Rows stay what they are. Metadata fields are indexed as in the folder, and those of `filter_indexes` too. Raises
    DamagedIndexError, CompactionError for a kind that Milvus lacks, FailedPreconditionError for a document that it
    has no room for, UnavailableError, or CancelledByCallerError; then the collection is taken away again.
    """
    base = snapshot.base()
    base.verify((DOCUMENTS_FILE,))
    snapshot.verify()
    if snapshot.root is not None:
        changes_file = live_file(snapshot.root, base.manifest.generation)
        check_changes(
            changes_file,
            base.documents_file,
            base.manifest.digest(),
            base.manifest.dimension,
            snapshot.manifest.sequence,
        )
    knobs = FaissIndex.load(snapshot.index_file, memory_map=True).settings()
    with base.held(), contextlib.closing(_store_of(snapshot)) as store:
        sequence, rows = store.rows_now()
        manifest = snapshot.manifest.model_copy(
            update={"ntotal": len(rows), "files": {}, "base_generation": None, "sequence": 0}
        )
        facts = Facts(
            manifest=manifest,
            source=str(snapshot.root or snapshot.folder),
            source_id=f"{base.manifest.digest()} {sequence}",
            number=number,
            etag_prefix=uuid.uuid4().hex[:8],
            nprobe=knobs["nprobe"],
            ef_search=knobs["ef_search"],
            checkpoint=Checkpoint(next_row=int(rows[-1]) + 1 if len(rows) else 0, num_documents=len(rows)),
            is_whole=False,
        )
        log.set_facts(collection, facts)
        try:
            create_documents(connection, collection, manifest)
            fields = sorted(store.indexed_fields | set(filter_indexes))
            facts = facts.model_copy(
                update={"filter_indexes": create_filter_indexes(connection, collection, fields)}
            )
            progress("import", 0, len(rows))
            for start in range(0, len(rows), _ROWS_PER_CHUNK):
                _check(cancelled)
                _write(connection, collection, store, rows[start : start + _ROWS_PER_CHUNK].tolist())
                progress("import", min(start + _ROWS_PER_CHUNK, len(rows)), len(rows))
            connection.call("flush", collection, timeout_s=_IMPORT_TIMEOUT_S)
            connection.call("load_collection", collection, timeout_s=_IMPORT_TIMEOUT_S)
            checkpoint = facts.checkpoint.model_copy(update={"timestamp": connection.last_write})
        except BaseException:
            with contextlib.suppress(Exception):
                discard(connection, log, collection)
            raise
    facts = facts.model_copy(update={"is_whole": True, "checkpoint": checkpoint})
    log.set_facts(collection, facts)
    return facts


def discard(connection: MilvusConnection, log: ChangeLog, collection: str) -> None:
    """Takes away a collection that is not whole, and its facts."""
    connection.call("drop_collection", collection)
    log.clear_facts(collection)


def _check(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise CancelledByCallerError("the operation was cancelled")


def _write(connection: MilvusConnection, collection: str, store: LiveStore, rows: list[int]) -> None:
    documents = store.documents_by_row(rows)
    vectors = store.embeddings_of(rows)
    try:
        entities = [
            entity(
                f"document {documents[row].key!r}",
                row,
                documents[row].key,
                documents[row].title,
                documents[row].text,
                documents[row].metadata,
                vector,
            )
            for row, vector in zip(rows, vectors, strict=True)
        ]
    except InvalidArgumentError as error:
        raise FailedPreconditionError(error.message, reason="DOCUMENT_TOO_LARGE") from error
    connection.upsert(collection, entities)


def _store_of(snapshot: Snapshot) -> LiveStore:
    base = snapshot.base()
    changes = None if snapshot.root is None else live_file(snapshot.root, base.manifest.generation)
    if changes is not None and not is_begun(changes, base.documents_file):
        changes = None
    return LiveStore(base.documents_file, changes, base.manifest.dimension, "")
