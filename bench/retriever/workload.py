"""The workload of the retriever's benchmark: clustered random embeddings, English passages, real tokenizers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.progress import shown_progress
from retriever_service.ingest.records import Record

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoint"
N_DOCS = 5
Floats = npt.NDArray[np.float32]

_CHUNK = 10_000
_CLUSTERS = 2_000
_LATENT = 48
_WORDS = 100


@dataclass(frozen=True)
class Corpus:
    """`size` documents of `dim` dimensions; what a build reads, made as it is read.

    Embeddings are of unit length around 2,000 centres and vary in 48 directions: what sentence encoders give
    is about as crowded, and uniform noise has no neighbours to find. Texts are 100 words of the demo's corpus.
    """

    size: int
    dim: int

    @property
    def path(self) -> Path:
        """A name for messages."""
        return Path(f"synthetic-{self.size}x{self.dim}")

    def count(self) -> int:
        """All of them."""
        return self.size

    def fingerprint(self) -> str:
        """The same corpus every time."""
        return hashlib.sha256(str(self.path).encode()).hexdigest()

    def __iter__(self) -> Iterator[Record]:
        """Yields the records."""
        texts = passages()
        for start in range(0, self.size, _CHUNK):
            for row, vector in enumerate(self.vectors(start), start=start):
                title, text = texts[row % len(texts)]
                yield Record(f"row {row}", f"doc-{row}", title, text, None, vector)

    def vectors(self, start: int) -> Floats:
        """The embeddings of up to 10,000 rows from `start`, a multiple of that."""
        return self._drawn(np.random.default_rng((1, start)), min(_CHUNK, self.size - start))

    def questions(self, count: int) -> Floats:
        """Questions that lie as documents do, but are none of them."""
        return self._drawn(np.random.default_rng(2), count)

    def _drawn(self, rng: np.random.Generator, count: int) -> Floats:
        centres, directions = self._space
        chosen = centres[rng.integers(0, len(centres), size=count)]
        noise = rng.standard_normal((count, _LATENT), dtype=np.float32) @ directions
        drawn = chosen + noise / np.float32(np.sqrt(_LATENT))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        return drawn

    @cached_property
    def _space(self) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.standard_normal((self.dim, 2 * _LATENT)))
        directions = np.ascontiguousarray(basis[:, :_LATENT].T, dtype=np.float32)
        centres = rng.standard_normal((_CLUSTERS, 2 * _LATENT)) @ basis.T / np.sqrt(2 * _LATENT)
        return centres.astype(np.float32), directions


def passages() -> list[tuple[str, str]]:
    """Titles and texts of 100 words, from the demo's corpus."""
    lines = (ROOT / "demo" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    words = itertools.cycle(" ".join(document["text"] for document in documents).split())
    return [
        (document["title"], " ".join(itertools.islice(words, _WORDS)))
        for document in (documents * (1 + 2000 // len(documents)))[:2000]
    ]


def question_texts(count: int) -> list[str]:
    """Questions of the demo."""
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return list(itertools.islice(itertools.cycle(json.loads(line)["question"] for line in lines), count))


def index(corpus: Corpus, kind: str, folder: Path) -> Path:
    """The corpus's index in `folder`; built once, and found there by later runs. A killed build goes on."""
    place = folder / f"{corpus.path}-{kind.replace(',', '-')}"
    if (place / "CURRENT").exists():
        return place
    reader: Any = corpus
    with shown_progress(Console(stderr=True)) as progress:
        build_index(
            reader,
            place,
            encoder=None,
            embedding_name="synthetic",
            options=BuildOptions(kind=kind),
            progress=progress,
        )
    return place


def factory_strings(size: int) -> dict[str, str]:
    """Flat, HNSW and IVF-PQ for a corpus of this size, by their short names."""
    nlist = 1 << round(np.log2(np.sqrt(size)))
    return {"Flat": "Flat", "HNSW": "HNSW32", "IVF-PQ": f"IVF{nlist},PQ48x8"}
