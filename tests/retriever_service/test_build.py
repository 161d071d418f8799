"""Building generations of an index."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from retriever_service.errors import BuildError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.manifest import Embedding
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import vectors
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.ingest.verify import verify_index
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Metric, SearchParameters
from tests.retriever_service.damaged_folders import flip, repaired
from tests.retriever_service.tiny_models import embeddings_of, make_documents, write_jsonl

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


class FailingEncoder(CountingEncoder):
    """Fails at a passage, as a machine does, until it is mended."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.num_encoded = 0

    def encode(self, passages: Sequence[tuple[str, str]]) -> np.ndarray:
        if self.error is not None and self.num_encoded:
            raise self.error
        self.num_encoded += len(passages)
        return super().encode(passages)


@pytest.mark.parametrize(
    "error", [BuildError("an actor died"), OSError("no such device"), RuntimeError("cuda")]
)
def test_a_build_goes_on_behind_what_was_embedded_when_the_machine_failed(
    tmp_path: Path, error: Exception
) -> None:
    """All that was embedded was thrown away where an actor died, or the corpus could not be read for a moment."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "x" * (1 + row % 7)} for row in range(1200)])
    encoder = FailingEncoder()

    def build() -> Snapshot:
        return build_index(
            CorpusReader(corpus),
            tmp_path / "index",
            encoder=encoder,
            embedding_name=None,
            options=BuildOptions(),
            progress=lambda *_: None,
        )

    encoder.error = error
    with pytest.raises(type(error), match=str(error)):
        build()
    encoder.error = None
    assert build().manifest.ntotal == encoder.num_encoded == 1200


@pytest.mark.parametrize(
    ("stage", "name", "content"),
    [
        ("documents", "documents.sqlite.unfinished", b"overwritten" * 1000),
        ("index", "partial.faiss", b""),
        ("index", "partial.faiss", b"overwritten"),
    ],
)
def test_a_damaged_file_of_an_unfinished_build_is_named_and_made_anew(
    tmp_path: Path,
    build_corpus: Build,
    stage: str,
    name: str,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every later build failed at it."""
    monkeypatch.setattr(vectors, "_VECTORS_PER_CHUNK", 100)
    corpus = write_jsonl(tmp_path / "c.jsonl", make_documents(700, 16))

    at = stage

    def killed(stage: str, done: int, total: int | None) -> None:
        if stage == at and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(
            CorpusReader(corpus),
            tmp_path / "index",
            encoder=None,
            embedding_name="tiny-encoder",
            options=BuildOptions(kind="IVF8,Flat", checkpoint_s=0),
            progress=killed,
        )
    damaged = tmp_path / "index" / ".building" / name
    assert damaged.exists()
    damaged.write_bytes(content)
    built = build_corpus(corpus, tmp_path / "index", kind="IVF8,Flat")
    assert str(damaged) in caplog.text
    assert built.manifest.files == build_corpus(corpus, tmp_path / "whole", kind="IVF8,Flat").manifest.files


def test_the_training_sample_is_read_in_chunks(
    tmp_path: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rows of SQLite, it took three times its size."""
    asked: list[int] = []
    read = SqliteStore.embeddings_of

    def counted(self: SqliteStore, rows: Sequence[int]) -> np.ndarray:
        asked.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(vectors, "_VECTORS_PER_CHUNK", 100)
    monkeypatch.setattr(SqliteStore, "embeddings_of", counted)
    build_corpus(
        write_jsonl(tmp_path / "c.jsonl", make_documents(650, 16)), tmp_path / "index", kind="IVF8,Flat"
    )
    assert asked == [*[100] * 6, 50] * 2


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


def test_a_faiss_file_has_its_own_knobs_unless_others_are_given(
    tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """They were ignored."""
    source = build_corpus(corpus, tmp_path / "other", kind="IVF30,Flat", nprobe=7).index_file
    for given, nprobe in ((None, 7), (30, 30)):
        adopted = build_corpus(corpus, tmp_path / "index", faiss_file=source, nprobe=given)
        assert FaissIndex.load(adopted.index_file).settings()["nprobe"] == nprobe
        flip(adopted.index_file)
        assert repaired(tmp_path / "index", nprobe=None)
        repaired_file = Snapshot.open(tmp_path / "index").index_file
        assert FaissIndex.load(repaired_file).settings()["nprobe"] == nprobe


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IVF8,Flat"])
def test_a_faiss_file_with_ids_that_are_no_rows_is_refused(
    tmp_path: Path, corpus: Path, documents: list[dict[str, Any]], build_corpus: Build, kind: str
) -> None:
    """It was built, and served documents that there are not."""
    embeddings = embeddings_of(documents)
    for first in (0, 1000):
        index = faiss.index_factory(embeddings.shape[1], kind)
        index.train(embeddings)
        index.add_with_ids(embeddings, np.arange(first, first + len(embeddings)))
        faiss.write_index(index, str(tmp_path / "ids.faiss"))
        if first:
            with pytest.raises(BuildError, match=r"ids\.faiss has ids of its own: .* from 0 to 59"):
                build_corpus(corpus, tmp_path / "index", faiss_file=tmp_path / "ids.faiss")
        else:
            build_corpus(corpus, tmp_path / "index", faiss_file=tmp_path / "ids.faiss")
            verify_index(tmp_path / "index", lambda what: None)


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
