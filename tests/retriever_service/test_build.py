"""Building generations of an index."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.errors import BuildError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.manifest import Embedding
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Metric, SearchParameters
from tests.retriever_service.tiny_models import make_documents, write_jsonl

Build = Callable[..., Snapshot]


class CountingEncoder:
    """Embeds a passage as [rank, length of title, length of text]."""

    def __init__(self) -> None:
        self.largest_chunk = 0

    def description(self) -> Embedding:
        return Embedding(name="counting", digest="sha256:abc")

    def encode(self, passages: Sequence[tuple[str, str]]) -> np.ndarray:
        self.largest_chunk = max(self.largest_chunk, len(passages))
        return np.asarray([[1, len(title), len(text)] for title, text in passages], dtype=np.float32)


def test_key_given_twice_names_both_lines(tmp_path: Path, build_corpus: Build) -> None:
    lines = [{"key": f"k{row}", "text": "t", "embedding": [1.0]} for row in range(700)]
    lines[650]["key"] = "k3"
    with pytest.raises(BuildError, match=r"line 651: key 'k3' is already taken by .*line 4"):
        build_corpus(write_jsonl(tmp_path / "c.jsonl", lines), tmp_path / "index")
    assert not (tmp_path / "index" / "CURRENT").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no documents"),
        ([{"text": "a", "embedding": [1.0]}, {"text": "b"}], "line 2: no embedding: give --embedding-model"),
        (
            [{"text": "a", "embedding": [1.0]}, {"text": "b", "embedding": [1.0, 2.0]}],
            "line 2: .* dimension 2",
        ),
        (
            [{"text": "a", "embedding": [1.0]}, {"text": "b", "embedding": [0.0]}],
            "line 2: embedding is zero: no question can find it",
        ),
    ],
)
def test_corpus_that_cannot_be_indexed_is_refused(
    tmp_path: Path, build_corpus: Build, lines: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(BuildError, match=said):
        build_corpus(write_jsonl(tmp_path / "c.jsonl", lines), tmp_path / "index")


def test_build_streams_the_corpus_through_the_encoder(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    lines = [{"title": "t" * (row % 5), "text": "x" * (1 + row % 7)} for row in range(1200)]
    heard: list[tuple[str, int, int | None]] = []
    snapshot = build_index(
        CorpusReader(write_jsonl(tmp_path / "c.jsonl", lines)),
        tmp_path / "index",
        encoder=encoder,
        embedding_name=None,
        options=BuildOptions(),
        progress=lambda stage, done, total: heard.append((stage, done, total)),
    )
    assert encoder.largest_chunk < 1200
    assert ("documents", 1200, None) in heard
    assert heard[-1] == ("publish", 1, 1)
    assert snapshot.manifest.embedding.matches("sha256:abc")
    store = SqliteStore(snapshot.documents_file, 3)
    assert store.embeddings_of([8]).tolist() == [[1, 3, 2]]
    assert store.documents_by_key(["8"])[("8")].title == "ttt"
    store.close()


@pytest.mark.parametrize("kind", ["Flat", "hnsw", "IVF8,Flat", "IVF8,PQ4x4"])
@pytest.mark.parametrize("metric", list(Metric))
def test_every_kind_is_built_the_same_twice(
    tmp_path: Path, build_corpus: Build, kind: str, metric: Metric
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", make_documents(400, 16))
    first = build_corpus(corpus, tmp_path / "index", kind=kind, metric=metric, nprobe=5)
    second = build_corpus(corpus, tmp_path / "index", kind=kind, metric=metric, nprobe=5)
    assert first.manifest.files == second.manifest.files
    index = FaissIndex.load(second.index_file)
    assert (index.ntotal, index.metric) == (400, metric)
    assert second.manifest.kind in {kind, "HNSW32"}


def test_faiss_file_that_does_not_fit_the_corpus_is_refused(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    other = build_corpus(write_jsonl(tmp_path / "c.jsonl", make_documents(7, 16)), tmp_path / "other")
    with pytest.raises(BuildError, match="holds 7 vectors of dimension 16, the corpus 60"):
        build_corpus(corpus, tmp_path / "index", faiss_file=other.index_file)
    with pytest.raises(BuildError, match="no faiss file"):
        build_corpus(corpus, tmp_path / "index", faiss_file=tmp_path / "none")


def test_float16_embeddings_take_half_the_room_and_are_what_is_indexed(
    tmp_path: Path, build_corpus: Build
) -> None:
    documents = make_documents(100, 16)
    corpus = write_jsonl(tmp_path / "c.jsonl", documents)
    snapshot = build_corpus(corpus, tmp_path / "index", embeddings_dtype="float16")
    store = SqliteStore(snapshot.documents_file, 16)
    stored = store.embeddings_of(range(100))
    given = np.asarray([document["embedding"] for document in documents])
    np.testing.assert_array_equal(stored, given.astype(np.float16).astype(np.float32))
    (size,) = store._select("SELECT length(embedding) FROM embeddings WHERE row IN", [0])
    assert size[0] == 32
    _, scores = FaissIndex.load(snapshot.index_file).search(stored[:5], 1, SearchParameters())
    np.testing.assert_allclose(scores[:, 0], (stored[:5] ** 2).sum(axis=1), rtol=1e-5)
    store.close()


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([0.0] * 3, "embedding is zero"),
        ([np.nan] * 3, "is not finite"),
        ([1e17] * 3, "is longer than 1e\\+16"),
    ],
)
def test_an_encoder_s_unusable_embedding_is_refused_by_its_record(
    tmp_path: Path, vector: list[float], said: str
) -> None:
    class OneWrong(CountingEncoder):
        def encode(self, passages: Sequence[tuple[str, str]]) -> np.ndarray:
            made = super().encode(passages)
            made[[text == "wrong" for _, text in passages]] = vector
            return made

    lines = [{"text": "right"}] * 600 + [{"text": "wrong"}]
    with pytest.raises(BuildError, match=f"line 601: .*{said}"):
        build_index(
            CorpusReader(write_jsonl(tmp_path / "c.jsonl", lines)),
            tmp_path / "index",
            encoder=OneWrong(),
            embedding_name=None,
            options=BuildOptions(),
            progress=lambda *_: None,
        )
    assert not (tmp_path / "index" / "CURRENT").exists()


def test_embedding_that_is_zero_as_float16_is_refused(tmp_path: Path, build_corpus: Build) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "embedding": [1e-9]}])
    build_corpus(corpus, tmp_path / "float32")
    with pytest.raises(BuildError, match="line 1: embedding is zero"):
        build_corpus(corpus, tmp_path / "float16", embeddings_dtype="float16")


def test_embedding_beyond_float16_is_refused(tmp_path: Path, build_corpus: Build) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "embedding": [70000.0]}])
    with pytest.raises(BuildError, match="line 1: embedding holds 70000, more than float16 can"):
        build_corpus(corpus, tmp_path / "index", embeddings_dtype="float16")
