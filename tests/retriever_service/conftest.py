"""An index built once, and a retriever served over a loopback port."""

import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rag_serving.health import Readiness
from rag_serving.metrics import Metrics
from rag_serving.server import GrpcServer
from retriever_service.config import RetrieverSettings
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.tokenizer import ContextTokenizer
from retriever_service.corpus.base import Corpus
from retriever_service.corpus.local import LocalCorpus
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.main import load, make_serving
from retriever_service.metrics import RetrieverMetrics
from retriever_service.retriever import Retriever, RetrieverLimits
from retriever_service.store.passage_reader import PassageCache
from tests.retriever_service.milvus_server import ENGINES, LEASE_S, MilvusServer, import_folder, library
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


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A passage encoder of 12 dimensions."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def build_corpus() -> Callable[..., Snapshot]:
    return build


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """An index folder of the corpus."""
    build(corpus, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """An index folder of half as many documents."""
    build(write_jsonl(tmp_path / "other.jsonl", make_documents(30, DIM)), tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture(scope="session")
def milvus_engine(request: pytest.FixtureRequest) -> Callable[[Path], MilvusServer]:
    """Makes a Milvus of the kind that --milvus names, below a folder."""
    return ENGINES[request.config.getoption("--milvus")]


@pytest.fixture(scope="session")
def milvus(
    tmp_path_factory: pytest.TempPathFactory, milvus_engine: Callable[[Path], MilvusServer]
) -> Iterator[MilvusServer]:
    """Milvus' server, the same for all tests."""
    server = milvus_engine(tmp_path_factory.mktemp("milvus"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["local", "milvus"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def approximate(request: pytest.FixtureRequest, backend: str) -> None:
    """For tests of what an index misses."""
    if backend == "milvus" and request.config.getoption("--milvus") == "standalone":
        pytest.skip("Milvus makes no index of segments as small as a test's: its searches are exact there")


@pytest.fixture(scope="session")
def imported(milvus: MilvusServer) -> Callable[[Path], str]:
    """Returns the name in Milvus of the corpus that an index folder was made, once."""
    names: dict[Path, str] = {}

    def name_of(folder: Path) -> str:
        if folder not in names:
            names[folder] = f"t{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
            import_folder(milvus.uri, names[folder], folder)
        return names[folder]

    return name_of


@pytest.fixture
def opened(request: pytest.FixtureRequest, backend: str) -> Callable[..., Any]:
    """Returns a context manager that opens the corpus of an index folder, in the backend of the test."""

    @contextlib.contextmanager
    def open_corpus(folder: Path, **options: Any) -> Iterator[Corpus]:
        with contextlib.ExitStack() as stack:
            if backend == "local":
                corpus: Corpus = LocalCorpus(folder, **options)
            else:
                name = request.getfixturevalue("imported")(folder)
                uri = request.getfixturevalue("milvus").uri
                corpus = stack.enter_context(library(uri, name, **options)).active()
            stack.callback(corpus.close)
            yield corpus

    return open_corpus


@pytest.fixture
def retrieving(opened: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a context manager that makes a retriever of a snapshot."""

    @contextlib.asynccontextmanager
    async def retrieve(
        snapshot: Snapshot, passage_cache: PassageCache | None = None, **limits: Any
    ) -> AsyncIterator[Retriever]:
        assembler = ContextAssembler(
            ContextTokenizer(bpe_tokenizer()), title_sep=" / ", doc_sep=" // ", prefix=""
        )
        with opened(snapshot.root) as corpus:
            retriever = Retriever(
                corpus.generation.index,
                corpus.generation.store,
                assembler,
                RetrieverMetrics(Metrics("retriever")),
                generation=corpus.generation.number,
                limits=RetrieverLimits(**limits),
                passage_cache=passage_cache,
            )
            try:
                yield retriever
            finally:
                await retriever.close()

    return retrieve


@pytest.fixture
def backend_settings(request: pytest.FixtureRequest, backend: str) -> Callable[[Path], dict[str, Any]]:
    """Returns the settings that serve an index folder's documents from the backend of the test."""

    def settings(folder: Path) -> dict[str, Any]:
        if backend == "local":
            return {"index_folder": folder}
        return {
            "backend": "milvus",
            "milvus_uri": request.getfixturevalue("milvus").uri,
            "milvus_collection": request.getfixturevalue("imported")(folder),
            "milvus_lease_s": LEASE_S,
            "activation_root": folder.parent,
        }

    return settings


@pytest.fixture
def serve_retriever(
    index_folder: Path, checkpoint: Path, backend_settings: Callable[[Path], dict[str, Any]]
) -> Callable[..., contextlib.AbstractAsyncContextManager[Any]]:
    """Returns a context manager that serves a retriever and gives it with a channel and its metrics."""
    default_folder = index_folder

    @contextlib.asynccontextmanager
    async def serve(index_folder: Path = default_folder, **overrides: Any) -> AsyncIterator[Any]:
        from rag.retriever.v1 import retriever_service_pb2_grpc
        from retriever_service.servicer import SERVICE_NAME

        given = {
            **backend_settings(index_folder),
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
        metrics = Metrics("retriever")
        retriever_metrics = RetrieverMetrics(metrics)
        loaded = load(settings, retriever_metrics)
        serving = make_serving(loaded, settings, retriever_metrics)
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
