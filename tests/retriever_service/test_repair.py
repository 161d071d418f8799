"""`rag-index repair`: a damaged snapshot comes back from SQLite, with every change since it was written."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DamagedIndexError, ReadOnlyError
from retriever_service.index.manifest import Embedding
from retriever_service.ingest.repair import repair_index
from retriever_service.ingest.verify import verify_index
from retriever_service.types import SearchParameters

DIM = 16
Build = Callable[..., Any]


def repaired(folder: Path) -> bool:
    quiet = {"step": lambda what: None, "progress": lambda stage, done, total: None}
    return repair_index(folder, nprobe=4, ef_search=32, **quiet)[1]  # type: ignore[arg-type]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(corpus: LocalCorpus) -> Any:
    vector = np.random.default_rng(5).standard_normal((1, DIM)).astype(np.float32)
    document = NewDocument("fresh", "", "text")
    corpus.upsert(Upsert("", "d", [document], vector, False, Embedding(name="tiny-encoder")))
    corpus.delete(Delete("", "d", [("doc-3", "")]))
    return vector


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_index_is_refused_by_name_and_built_anew(
    is_compacted: bool, damage: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    folder = tmp_path / "index"
    build_corpus(corpus, folder, kind="HNSW8")
    live = LocalCorpus(folder)
    vector = change(live)
    if is_compacted:
        live.compact(lambda *_: None, threading.Event())
    live.close()
    for file in folder.glob("generation-*/index.faiss"):
        if damage == "flipped":
            flip(file)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        else:
            file.unlink()
    with pytest.raises(DamagedIndexError, match=r"index\.faiss"):
        LocalCorpus(folder)
    assert repaired(folder)
    verify_index(folder, lambda what: None)
    live = LocalCorpus(folder)
    try:
        index, store = live.generation.index, live.generation.store
        assert live.generation.manifest.kind == "HNSW8"
        assert len(store) == index.ntotal == 60
        rows, _ = index.search(vector * 10, 3, SearchParameters())
        assert store.documents_by_row([int(rows[0, 0])])[int(rows[0, 0])].key == "fresh"
        assert not store.documents_by_key(["doc-3"])
        change(live)
        live.compact(lambda *_: None, threading.Event())
    finally:
        live.close()
    assert not repaired(folder)


def test_what_cannot_be_repaired_is_said(tmp_path: Path, corpus: Path, build_corpus: Build) -> None:
    folder = tmp_path / "index"
    snapshot = build_corpus(corpus, folder)
    flip(snapshot.documents_file)
    with pytest.raises(DamagedIndexError, match=r"documents\.sqlite"):
        repaired(folder)


def test_nothing_is_repaired_under_a_retriever_that_writes(
    tmp_path: Path, corpus: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(root: Path) -> None:
        raise ReadOnlyError(f"another retriever writes to {root}")

    folder = tmp_path / "index"
    flip(build_corpus(corpus, folder).index_file)
    monkeypatch.setattr("retriever_service.corpus.lock.acquire", taken)
    with pytest.raises(ReadOnlyError):
        repaired(folder)
