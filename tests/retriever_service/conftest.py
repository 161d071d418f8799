"""An index built once, and a retriever served over a loopback port."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from rag_serving.health import Readiness
from rag_serving.metrics import Metrics
from rag_serving.server import GrpcServer
from retriever_service.config import RetrieverSettings
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.main import load, make_serving
from retriever_service.metrics import RetrieverMetrics
from tests.retriever_service.tiny_models import (
    bpe_tokenizer,
    make_documents,
    save_checkpoint,
    wordpiece_tokenizer,
    write_jsonl,
)

DIM = 16
NUM_DOCUMENTS = 60


def build(corpus: Path, folder: Path, **options: Any) -> Snapshot:
    """Builds an index of a corpus that brings its embeddings along."""
    return build_index(
        CorpusReader(corpus),
        folder,
        encoder=None,
        embedding_name="tiny-encoder",
        options=BuildOptions(**options),
        progress=lambda stage, done, total: None,
    )


@pytest.fixture(scope="session")
def documents() -> list[dict[str, Any]]:
    return make_documents(NUM_DOCUMENTS, DIM)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docs.jsonl", documents)


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("index") / "flat"
    build(corpus, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RAG checkpoint's tokenizers and config: BART-like generator, BERT-like question encoder."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), bpe_tokenizer(), wordpiece_tokenizer())


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def build_corpus() -> Callable[..., Snapshot]:
    return build


@pytest.fixture
def serve_retriever(
    index_folder: Path, checkpoint: Path
) -> Callable[..., contextlib.AbstractAsyncContextManager[Any]]:
    """Returns a context manager that serves a retriever and gives it with a channel and its metrics."""

    @contextlib.asynccontextmanager
    async def serve(**overrides: Any) -> AsyncIterator[Any]:
        from rag.retriever.v1 import retriever_service_pb2_grpc
        from retriever_service.servicer import SERVICE_NAME

        given = {
            "index_folder": index_folder,
            "generator_checkpoint": str(checkpoint),
            "grpc_port": 0,
            "search_threads": 1,
            "max_batch": 32,
            "max_n_docs": 50,
            "max_contexts": 200,
            "max_question_chars": 5000,
            "max_get_documents": 20,
        }
        settings = RetrieverSettings.model_validate(given | overrides)
        loaded = load(settings)
        metrics = Metrics("retriever")
        serving = make_serving(loaded, settings, RetrieverMetrics(metrics))
        server = GrpcServer(settings, service_names=[SERVICE_NAME], readiness=Readiness(), metrics=metrics)
        retriever_service_pb2_grpc.add_RetrieverServiceServicer_to_server(serving.servicer, server.registrar)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield (
                    serving.generations.current.retriever,
                    retriever_service_pb2_grpc.RetrieverServiceStub(channel),
                    metrics,
                )
        finally:
            await server.stop()
            await serving.close()

    return serve
