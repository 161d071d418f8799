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
from retriever_service.backends import activation_root, open_backend
from retriever_service.bounded_cache import BoundedCache
from retriever_service.config import ENV_PREFIX, RetrieverSettings
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.tokenizer import (
    ContextDefaults,
    QuestionTokenizer,
    load_context_defaults,
    load_context_tokenizer,
    load_question_tokenizer,
)
from retriever_service.corpus.base import Corpus, CorpusLibrary, Generation
from retriever_service.corpus_wire import ChangeLimits
from retriever_service.follower import Follower
from retriever_service.generations import Generations
from retriever_service.index.base import VectorIndex
from retriever_service.index.faiss_index import (
    ask_nobody_to_stop,
    default_num_threads,
    multiply_batches,
    set_num_threads,
)
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.maintenance import Encoder, Maintenance
from retriever_service.metrics import RetrieverMetrics
from retriever_service.retriever import Retriever, RetrieverLimits
from retriever_service.servicer import SERVICE_NAME, RequestLimits, RetrieverServicer
from retriever_service.store.passage_reader import PassageCache
from retriever_service.types import Query

logger = logging.getLogger(__name__)

PROGRAM = "rag-retriever"
_WARMUP = "warmup"
# Below it a search is so short that sharing it among threads costs what the event loop needs to answer.
_SHARED_FROM_BYTES = 64 << 20
_CORPUS = "corpus"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that is read before the ports open."""

    library: CorpusLibrary
    corpus: Corpus
    assembler: ContextAssembler
    question_tokenizer: QuestionTokenizer | None
    limits: RequestLimits
    encoder: Encoder | None


@dataclass(frozen=True, slots=True)
class Serving:
    """What serves inside the running event loop."""

    library: CorpusLibrary
    generations: Generations
    maintenance: Maintenance
    servicer: RetrieverServicer
    follower: Follower

    async def close(self) -> None:
        """Stops operations and changes, then the generations, and closes their corpora."""
        await self.maintenance.close()
        await self.generations.close()
        await asyncio.to_thread(self.library.close)


def main() -> None:
    """The command."""
    settings = load_settings(RetrieverSettings, env_prefix=ENV_PREFIX, program=PROGRAM)
    configure_logging(settings.log_level, settings.log_format)
    run_service(PROGRAM, functools.partial(serve, settings))


async def serve(settings: RetrieverSettings, started: Callable[[int, int], None] | None = None) -> None:
    """Loads, serves until SIGTERM or SIGINT, drains.

    `started` gets the gRPC and the HTTP port once warmed up. Raises RagError where it cannot start.
    """
    metrics = Metrics("retriever")
    retriever_metrics = RetrieverMetrics(metrics)
    loaded = await asyncio.to_thread(load, settings, retriever_metrics)
    serving = make_serving(loaded, settings, retriever_metrics)
    readiness = Readiness(_WARMUP)
    server = GrpcServer(settings, service_names=[SERVICE_NAME], readiness=readiness, metrics=metrics)
    retriever_service_pb2_grpc.add_RetrieverServiceServicer_to_server(serving.servicer, server.registrar)
    side_port = SidePort(settings, readiness=readiness, metrics=metrics)

    async def warm_up() -> None:
        current = serving.generations.current
        await warm_up_retriever(loaded.limits, current.retriever)
        readiness.set_met(_WARMUP)
        logger.info(
            "serving",
            extra={
                "ntotal": current.generation.index.ntotal,
                "generation": current.generation.number,
                "read_only": current.corpus.read_only_reason or "",
                "devices": ",".join(current.generation.index.devices),
            },
        )
        serving.maintenance.compact_if_due()
        if started is not None:
            started(server.port, side_port.port)

    def reached(reason: str | None) -> None:
        if reason is None:
            readiness.set_met(_CORPUS)
        else:
            readiness.set_unmet(_CORPUS, reason)

    follow = serving.maintenance.follow(settings.follow_interval_s, reached)
    run = serving.follower.run(settings.follow_interval_s)
    following = [asyncio.create_task(follow, name="follow"), asyncio.create_task(run, name="follower")]
    try:
        await serve_until_stopped(server, side_port, warm_up=warm_up)
    finally:
        for task in following:
            task.cancel()
        await asyncio.wait(following)
        await serving.close()


def load(settings: RetrieverSettings, metrics: RetrieverMetrics) -> Loaded:
    """Reads index, documents and tokenizers. Raises a RagError that says what is missing or damaged."""
    library, corpus = open_backend(settings, metrics)
    try:
        manifest = corpus.generation.manifest
        defaults = load_context_defaults(settings.generator_checkpoint)
        assembler = _assembler(settings, defaults)
        question_tokenizer = load_question_tokenizer(
            settings.question_tokenizer or settings.generator_checkpoint,
            required=settings.question_tokenizer is not None,
        )
        limits = _limits(settings, defaults, manifest, assembler, question_tokenizer)
        encoder = _encoder(settings.embedding_model, settings.embedding_device, manifest.embedding)
    except BaseException:
        corpus.close()
        library.close()
        raise
    return Loaded(library, corpus, assembler, question_tokenizer, limits, encoder)


def make_serving(loaded: Loaded, settings: RetrieverSettings, metrics: RetrieverMetrics) -> Serving:
    """Puts together what serves, inside the running event loop."""
    passage_cache: PassageCache = BoundedCache(settings.document_cache_bytes)

    def make_retriever(generation: Generation) -> Retriever:
        return _retriever(generation, loaded, settings, metrics, passage_cache)

    generations = Generations(loaded.corpus, make_retriever, metrics, kept=settings.generations_kept)
    warm_up = functools.partial(warm_up_retriever, loaded.limits)
    follower = Follower(generations, loaded.library, warm_up)
    maintenance = Maintenance(
        generations,
        loaded.library,
        warm_up,
        activation_root=activation_root(settings),
        encoder=loaded.encoder,
        compact_after=settings.compact_after,
    )
    change_limits = ChangeLimits(
        settings.max_change_documents, settings.max_text_bytes, settings.max_message_bytes
    )
    servicer = RetrieverServicer(generations, maintenance, loaded.assembler, loaded.limits, change_limits)
    return Serving(loaded.library, generations, maintenance, servicer, follower)


def _retriever(
    generation: Generation,
    loaded: Loaded,
    settings: RetrieverSettings,
    metrics: RetrieverMetrics,
    passage_cache: PassageCache,
) -> Retriever:
    threads = settings.search_threads or search_threads(generation.index)
    multiply_batches(threads)
    ask_nobody_to_stop()
    search_executor = ThreadPoolExecutor(
        generation.index.parallel_searches, "search", initializer=set_num_threads, initargs=(threads,)
    )
    return Retriever(
        generation.index,
        generation.store,
        loaded.assembler,
        metrics,
        generation=generation.number,
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
        passage_cache=passage_cache,
    )


def search_threads(index: VectorIndex) -> int:
    """Returns how many threads of faiss a search of this index gets where nobody says."""
    vectors_bytes = index.ntotal * index.dimension * np.dtype(np.float32).itemsize
    return 1 if vectors_bytes < _SHARED_FROM_BYTES else default_num_threads()


async def warm_up_retriever(limits: RequestLimits, retriever: Retriever) -> None:
    """Searches and assembles once, with a question of no meaning."""
    dimension = retriever.index.dimension
    query = Query(
        question_hidden_states=np.full((1, dimension), 1 / np.sqrt(dimension), dtype=np.float32),
        n_docs=limits.default_n_docs,
        max_combined_length=limits.max_combined_length,
        question_texts=["warm up"],
    )
    await retriever.retrieve(query)


def _encoder(source: str | None, device: str, embedding: Embedding) -> Encoder | None:
    """Loads the passage encoder with the settings that the index was made with."""
    if source is None:
        return None
    # Imported here: a retriever that embeds nothing needs no torch.
    from retriever_service.ingest.embed import DEFAULT_TEMPLATE, PassageEncoder, Pooling  # noqa: PLC0415

    encoder = PassageEncoder(
        source,
        name=embedding.name,
        pooling=Pooling(embedding.pooling or Pooling.MEAN),
        normalize=bool(embedding.normalize),
        max_length=embedding.max_length,
        template=embedding.passage_template or DEFAULT_TEMPLATE,
        device=device,
    )
    made = encoder.description()
    if embedding.digest is not None and made.digest != embedding.digest:
        raise StartupError(
            f"--embedding-model {source} has digest {made.digest}, the index was made with {embedding.digest}"
        )
    return encoder


def _assembler(settings: RetrieverSettings, defaults: ContextDefaults) -> ContextAssembler:
    return ContextAssembler(
        load_context_tokenizer(settings.generator_checkpoint),
        title_sep=_first(settings.title_sep, defaults.title_sep, " / "),
        doc_sep=_first(settings.doc_sep, defaults.doc_sep, " // "),
        prefix=_first(settings.prefix, defaults.prefix, ""),
        cache_bytes=settings.context_cache_bytes,
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
