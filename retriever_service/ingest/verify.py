"""Checks an index folder through and through."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from retriever_service.errors import DamagedIndexError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import DOCUMENTS_FILE, Snapshot, live_file
from retriever_service.store.live_check import check_changes
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import SearchParameters

_VECTORS_PER_CHUNK = 16_384


def verify_index(folder: Path, step: Callable[[str], None]) -> Snapshot:
    """Checks manifest, sizes, checksums, that faiss and SQLite read their files, and that the two agree.

    The documents' changes are checked too, also while a retriever writes them.
    `step` hears what is checked next. Raises MissingIndexError, or DamagedIndexError naming the file.
    """
    step("manifest and sizes")
    snapshot = Snapshot.open(folder)
    manifest = snapshot.manifest
    step("checksums")
    snapshot.verify()
    step("vector index")
    index = FaissIndex.load(snapshot.index_file)
    found = (index.ntotal, index.dimension, index.metric)
    if found != (manifest.ntotal, manifest.dimension, manifest.metric):
        raise DamagedIndexError(snapshot.index_file, f"holds {found}, which is not what the manifest says")
    step("documents")
    base = snapshot.base()
    if base is not snapshot:
        base.verify((DOCUMENTS_FILE,))
    store = SqliteStore(base.documents_file, manifest.dimension)
    try:
        store.check()
        if len(store) != base.manifest.ntotal:
            raise DamagedIndexError(
                base.documents_file, f"{len(store)} documents, the manifest says {base.manifest.ntotal}"
            )
        step("embeddings")
        for embeddings in store.embedding_chunks(_VECTORS_PER_CHUNK):
            if not np.isfinite(embeddings).all():
                raise DamagedIndexError(base.documents_file, "an embedding is not finite")
        root = snapshot.root
        if root is not None:
            step("changes")
            check_changes(
                live_file(root, base.manifest.generation),
                base.documents_file,
                base.manifest.digest(),
                manifest.dimension,
                manifest.sequence,
            )
        step("search")
        rows, _ = index.search(store.embeddings_of([0]), 1, SearchParameters())
        if not 0 <= int(rows[0, 0]) < manifest.ntotal:
            raise DamagedIndexError(snapshot.index_file, f"a search finds row {int(rows[0, 0])}")
    finally:
        store.close()
    return snapshot
