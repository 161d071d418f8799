"""The corpus on Milvus' own engine: its clock, segments and log, which milvus-lite has not."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import UnavailableError
from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.filters import Equal
from retriever_service.milvus.corpus import MilvusCorpus
from retriever_service.types import SearchParameters
from tests.retriever_service.conftest import DIM
from tests.retriever_service.milvus_server import import_folder, library
from tests.retriever_service.milvus_standalone import StandaloneMilvus, is_installed
from tests.retriever_service.tiny_models import write_jsonl

pytestmark = pytest.mark.skipif(not is_installed(), reason="the distribution milvus is not installed")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneMilvus]:
    server = StandaloneMilvus(tmp_path_factory.mktemp("engine"))
    server.start()
    yield server
    server.stop()


def vector(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def upsert(corpus: MilvusCorpus, key: str, seed: int) -> None:
    documents = [NewDocument(key, "", "text", '{"kind":"new","whole":123456789012345678901}')]
    embedding = corpus.generation.manifest.embedding
    corpus.upsert(Upsert(f"{key} {seed}", "d", documents, 10 * vector(seed)[None], False, embedding))


def nearest(corpus: MilvusCorpus, seed: int, n_docs: int = 3, only: str = "") -> list[str]:
    store = corpus.generation.store
    selection = store.select(Equal("kind", only)) if only else None
    rows, _ = corpus.generation.index.search(10 * vector(seed)[None], n_docs, SearchParameters(), selection)
    found = store.documents_by_row([row for row in rows[0].tolist() if row >= 0])
    return [found[row].key for row in rows[0].tolist() if row >= 0]


def follow_once_loaded(corpus: MilvusCorpus) -> None:
    """A retriever follows every few seconds, and is not ready until that succeeds."""
    until_s = time.monotonic() + 60
    while True:
        try:
            corpus.follow()
        except UnavailableError:
            if time.monotonic() > until_s:
                raise
        else:
            return


def test_changes_are_seen_once_acknowledged_and_outlive_the_engine(
    engine: StandaloneMilvus,
    tmp_path: Path,
    documents: list[dict[str, Any]],
    build_corpus: Callable[..., Any],
) -> None:
    build_corpus(write_jsonl(tmp_path / "docs.jsonl", documents), tmp_path / "index")
    import_folder(engine.uri, "wiki", tmp_path / "index")
    with library(engine.uri, "wiki") as shelf, library(engine.uri, "wiki", take_changes=False) as reading:
        corpus, reader = shelf.active(), reading.active()
        imported = corpus._shown.state.timestamp
        assert imported > 0, "searches would wait for Milvus' clock"
        for seed in range(3):
            upsert(corpus, "fresh", seed)
            assert nearest(corpus, seed)[0] == "fresh"
            assert corpus._shown.state.timestamp > imported
        assert nearest(corpus, 2, 9, only="new") == ["fresh"]
        assert reader.follow()
        assert nearest(reader, 2, 9, only="new") == ["fresh"]
        metadata = corpus.generation.store.documents_by_key(["fresh"])["fresh"].metadata
        assert metadata == '{"kind":"new","whole":123456789012345678901}'
        upsert(corpus, "gone", 3)
        corpus.delete(Delete("", "d", [("gone", "")]))
        assert "gone" not in nearest(corpus, 3, 64)
        replaced = sorted(corpus._shown.state.hidden)
        assert len(replaced) == 3
        corpus._grace_s = 0.0
        corpus.follow()
        # Nothing hides them any more: only the timestamp keeps reads from what was deleted a moment ago.
        assert corpus.generation.store.documents_by_row(replaced, replaced=True) == {}
        assert corpus.compact(lambda *_: None, threading.Event()).number == 2
        assert nearest(corpus, 2)[0] == "fresh"
        engine.stop()
        engine.start()
        for one in (corpus, reader):
            follow_once_loaded(one)
            assert nearest(one, 2)[0] == "fresh"
            assert len(one.page(None, 100).documents) == len(documents) + 1
        upsert(corpus, "later", 4)
        assert nearest(corpus, 4)[0] == "later"
        reader.close()
        corpus.close()
