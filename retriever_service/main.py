"""`rag-retriever`: loads and verifies an index, warms up, serves until told to stop."""

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rag.retriever.v1 import retriever_service_pb2_grpc
from rag_serving.config import load_settings
from rag_serving.errors import StartupError
from rag_serving.health import Readiness
from rag_serving.logging import configure_logging
from rag_serving.metrics import Metrics
from rag_serving.process import run_service, serve_until_stopped
from rag_serving.server import GrpcServer
from rag_serving.sideport import SidePort
from retriever_service.config import ENV_PREFIX, RetrieverSettings
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.tokenizer import (
    ContextDefaults,
    QuestionTokenizer,
    load_context_defaults,
    load_context_tokenizer,
    load_question_tokenizer,
)
from retriever_service.errors import DamagedIndexError
from retriever_service.index.faiss_index import FaissIndex, set_num_threads
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import Snapshot
from retriever_service.metrics import RetrieverMetrics
from retriever_service.retriever import Retriever, RetrieverLimits
from retriever_service.servicer import SERVICE_NAME, RequestLimits, RetrieverServicer
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Query

logger = logging.getLogger(__name__)

PROGRAM = "rag-retriever"
_WARMUP = "warmup"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that is read before the ports open."""

    manifest: Manifest
    index: FaissIndex
    store: SqliteStore
    assembler: ContextAssembler
    question_tokenizer: QuestionTokenizer | None
    limits: RequestLimits


def main() -> None:
    """The command."""
    settings = load_settings(RetrieverSettings, env_prefix=ENV_PREFIX, program=PROGRAM)
    configure_logging(settings.log_level, settings.log_format)
    run_service(PROGRAM, functools.partial(serve, settings))


async def serve(settings: RetrieverSettings, started: Callable[[int, int], None] | None = None) -> None:
    """Loads, serves until SIGTERM or SIGINT, drains.

    `started` gets the gRPC and the HTTP port once warmed up. Raises RagError where it cannot start.
    """
    loaded = await asyncio.to_thread(load, settings)
    metrics = Metrics("retriever")
    retriever = make_retriever(loaded, settings, RetrieverMetrics(metrics))
    readiness = Readiness(_WARMUP)
    server = GrpcServer(settings, service_names=[SERVICE_NAME], readiness=readiness, metrics=metrics)
    servicer = RetrieverServicer(retriever, loaded.manifest, loaded.limits)
    retriever_service_pb2_grpc.add_RetrieverServiceServicer_to_server(servicer, server.registrar)
    side_port = SidePort(settings, readiness=readiness, metrics=metrics)

    async def warm_up() -> None:
        await warm_up_retriever(retriever, loaded.limits)
        readiness.set_met(_WARMUP)
        logger.info(
            "serving", extra={"ntotal": loaded.manifest.ntotal, "generation": loaded.manifest.generation}
        )
        if started is not None:
            started(server.port, side_port.port)

    try:
        await serve_until_stopped(server, side_port, warm_up=warm_up)
    finally:
        await retriever.close()


def load(settings: RetrieverSettings) -> Loaded:
    """Reads index, documents and tokenizers. Raises a RagError that says what is missing or damaged."""
    snapshot = Snapshot.open(settings.index_folder)
    if settings.verify:
        snapshot.verify()
    manifest = snapshot.manifest
    index = FaissIndex.load(snapshot.index_file, memory_map=settings.memory_map)
    if (index.ntotal, index.dimension, index.metric) != (
        manifest.ntotal,
        manifest.dimension,
        manifest.metric,
    ):
        raise DamagedIndexError(snapshot.index_file, "ntotal, dimension or metric are not the manifest's")
    store = SqliteStore(snapshot.documents_file, manifest.dimension)
    if len(store) != manifest.ntotal:
        raise DamagedIndexError(snapshot.documents_file, f"{len(store)} documents, not {manifest.ntotal}")
    defaults = load_context_defaults(settings.generator_checkpoint)
    assembler = _assembler(settings, defaults)
    question_tokenizer = load_question_tokenizer(
        settings.question_tokenizer or settings.generator_checkpoint,
        required=settings.question_tokenizer is not None,
    )
    limits = _limits(settings, defaults, manifest, assembler, question_tokenizer)
    return Loaded(manifest, index, store, assembler, question_tokenizer, limits)


def make_retriever(loaded: Loaded, settings: RetrieverSettings, metrics: RetrieverMetrics) -> Retriever:
    """Puts the retriever together inside the running event loop."""
    search_executor = None
    if settings.search_threads:
        search_executor = ThreadPoolExecutor(
            1, "search", initializer=set_num_threads, initargs=(settings.search_threads,)
        )
    return Retriever(
        loaded.index,
        loaded.store,
        loaded.assembler,
        metrics,
        generation=loaded.manifest.generation,
        question_tokenizer=loaded.question_tokenizer,
        limits=RetrieverLimits(
            batch_window_s=settings.batch_window_ms / 1000,
            max_search_batch=settings.max_search_batch,
            max_queued_questions=settings.max_queued_questions,
            assembly_threads=settings.assembly_threads,
            max_exact_rows=settings.max_exact_rows,
            recall_sample_rate=settings.recall_sample_rate,
        ),
        search_executor=search_executor,
    )


async def warm_up_retriever(retriever: Retriever, limits: RequestLimits) -> None:
    """Searches and assembles once, with the first document's own embedding as the question."""
    first = await asyncio.to_thread(retriever.store.embeddings_of, [0])
    query = Query(
        question_hidden_states=np.asarray(first),
        n_docs=limits.default_n_docs,
        max_combined_length=limits.max_combined_length,
        question_texts=["warm up"],
    )
    await retriever.retrieve(query)


def _assembler(settings: RetrieverSettings, defaults: ContextDefaults) -> ContextAssembler:
    return ContextAssembler(
        load_context_tokenizer(settings.generator_checkpoint),
        title_sep=_first(settings.title_sep, defaults.title_sep, " / "),
        doc_sep=_first(settings.doc_sep, defaults.doc_sep, " // "),
        prefix=_first(settings.prefix, defaults.prefix, ""),
    )


def _limits(
    settings: RetrieverSettings,
    defaults: ContextDefaults,
    manifest: Manifest,
    assembler: ContextAssembler,
    question_tokenizer: QuestionTokenizer | None,
) -> RequestLimits:
    max_combined_length = settings.max_combined_length or defaults.max_combined_length or 300
    if max_combined_length < assembler.min_combined_length:
        raise StartupError(
            f"max_combined_length {max_combined_length} is below"
            f" {assembler.min_combined_length}, the least that the tokenizer allows"
        )
    return RequestLimits(
        dimension=manifest.dimension,
        default_n_docs=min(settings.default_n_docs or defaults.n_docs or 5, settings.max_n_docs),
        max_n_docs=settings.max_n_docs,
        max_batch=settings.max_batch,
        max_contexts=settings.max_contexts,
        max_question_chars=settings.max_question_chars,
        max_get_documents=settings.max_get_documents,
        max_candidates=settings.max_candidates,
        max_combined_length=max_combined_length,
        min_combined_length=assembler.min_combined_length,
        num_question_tokens=None if question_tokenizer is None else question_tokenizer.num_tokens,
    )


def _first(given: str | None, checkpoint: str | None, default: str) -> str:
    return next(text for text in (given, checkpoint, default) if text is not None)


if __name__ == "__main__":
    main()
