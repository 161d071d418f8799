"""Index folders that were changed, and ways to damage and to repair them."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.corpus.local import LocalCorpus
from retriever_service.index.manifest import Embedding
from retriever_service.ingest.repair import repair_index

DIM = 16


def repaired(folder: Path, *, nprobe: int | None = 4) -> bool:
    quiet = {"step": lambda what: None, "progress": lambda stage, done, total: None}
    return repair_index(folder, nprobe=nprobe, ef_search=32, **quiet)[1]  # type: ignore[arg-type]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(corpus: LocalCorpus) -> Any:
    vector = np.random.default_rng(5).standard_normal((1, DIM)).astype(np.float32)
    document = NewDocument("fresh", "", "a text of its own")
    corpus.upsert(Upsert("", "d", [document], vector, False, Embedding(name="tiny-encoder")))
    corpus.delete(Delete("", "d", [("doc-3", "")]))
    return vector


def compacted(folder: Path) -> Path:
    """Changes an index folder, compacts it, and changes it again."""
    live = LocalCorpus(folder)
    change(live)
    live.compact(lambda *_: None, threading.Event())
    live.delete(Delete("", "d", [("doc-5", "")]))
    live.close()
    return folder
