"""`rag-generator`: starts the workers, proves that the retriever fits, serves until told to stop."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable

from generator_service import checkpoint as checkpoints
from generator_service.answerer import Answerer
from generator_service.checkpoint import Checkpoint
from generator_service.config import ENV_PREFIX, GeneratorSettings
from generator_service.engine.async_engine import AsyncEngine
from generator_service.engine.devices import default_devices
from generator_service.engine.messages import Ready
from generator_service.engine.worker_options import WorkerOptions
from generator_service.errors import MismatchError
from generator_service.explainer import Explainer
from generator_service.forward import Forwarder
from generator_service.forward_calls import ForwardCalls
from generator_service.metrics import GeneratorMetrics
from generator_service.request_checks import RequestLimits
from generator_service.retrieval_client import Expected, RetrievalClient
from generator_service.servicer import SERVICE_NAME, GeneratorServicer, ServedModel
from generator_service.types import ModelSource
from rag.generator.v1 import generator_service_pb2_grpc
from rag_serving.config import load_settings
from rag_serving.errors import RagError
from rag_serving.health import Readiness
from rag_serving.logging import configure_logging
from rag_serving.metrics import Metrics
from rag_serving.process import run_service, serve_until_stopped
from rag_serving.server import GrpcServer
from rag_serving.sideport import SidePort

logger = logging.getLogger(__name__)

PROGRAM = "rag-generator"
_WORKERS = "workers"
_RETRIEVER = "retriever"
_REFRESH_S = 1.0


def main() -> None:
    """The command."""
    settings = load_settings(GeneratorSettings, env_prefix=ENV_PREFIX, program=PROGRAM)
    configure_logging(settings.log_level, settings.log_format)
    run_service(PROGRAM, functools.partial(serve, settings))


async def serve(settings: GeneratorSettings, started: Callable[[int, int], None] | None = None) -> None:
    """Loads, serves until SIGTERM or SIGINT, drains.

    `started` gets the gRPC and the HTTP port once the workers are warm and the retriever fits. Raises RagError where
    it cannot start.
    """
    checkpoint = await asyncio.to_thread(checkpoints.read, settings)
    metrics = Metrics("generator")
    generator_metrics = GeneratorMetrics(metrics)
    readiness = Readiness(_WORKERS, *([_RETRIEVER] if settings.retriever_address else []))
    engine = AsyncEngine(
        _worker_options(settings, checkpoint.source),
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        max_queued=settings.max_queued_questions,
        on_change=lambda: _show_workers(engine, readiness),
    )
    tasks: list[asyncio.Task[None]] = []
    retrieval: RetrievalClient | None = None
    try:
        # the workers come first: the ports open once there is something to say about the model
        ready = await engine.start()
        retrieval = _retrieval(settings, checkpoint, ready)
        server = GrpcServer(settings, service_names=[SERVICE_NAME], readiness=readiness, metrics=metrics)
        question_tokenizer = checkpoint.question_tokenizer
        answerer = Answerer(
            engine,
            retrieval,
            checkpoint.generator_tokenizer,
            generator_metrics,
            question_pad_token_id=0 if question_tokenizer is None else question_tokenizer.pad_token_id,
        )
        model = ServedModel(checkpoint, ready, [w.device for w in engine.workers], _limits(settings, ready))
        pad = checkpoint.generator_tokenizer.pad_token_id
        forward = ForwardCalls(
            Forwarder(engine, retrieval, context_pad_token_id=pad),
            checkpoint,
            model.limits,
            past_expires_s=settings.past_key_values_expires_s,
        )
        generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(
            GeneratorServicer(answerer, Explainer(engine, answerer), model, forward), server.registrar
        )
        side_port = SidePort(settings, readiness=readiness, metrics=metrics)
        tasks.append(asyncio.create_task(_refresh(engine, generator_metrics)))

        async def warm_up() -> None:
            if retrieval is not None:
                await _wait_for_fit(retrieval, readiness, settings.retriever_check_s)
                tasks.append(
                    asyncio.create_task(_watch_fit(retrieval, readiness, settings.retriever_check_s))
                )
            logger.info("serving", extra={"checkpoint": checkpoint.digest, "decoder": ready.decoder})
            if started is not None:
                started(server.port, side_port.port)

        await serve_until_stopped(server, side_port, warm_up=warm_up)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if retrieval is not None:
            await retrieval.close()
        await engine.stop()


async def _wait_for_fit(retrieval: RetrievalClient, readiness: Readiness, pause_s: float) -> None:
    """Not ready until the retriever is there and was built for this generator; says why it is not."""
    said = ""
    while True:
        try:
            await retrieval.check_fit()
        except RagError as error:
            readiness.set_unmet(_RETRIEVER, error.message)
            if error.message != said:
                logger.warning("waiting for the retriever: %s", error.message)
                said = error.message
            await asyncio.sleep(pause_s)
        else:
            readiness.set_met(_RETRIEVER)
            return


async def _watch_fit(retrieval: RetrievalClient, readiness: Readiness, pause_s: float) -> None:
    """A retriever may come back with another index: one that does not fit ends readiness, one that does renews it.

    One that is away does not: questions with contexts of their own are still answered.
    """
    while True:
        await asyncio.sleep(pause_s)
        try:
            await retrieval.check_fit()
        except MismatchError as error:
            if _RETRIEVER not in readiness.reasons:
                logger.warning("the retriever no longer fits: %s", error.message)
            readiness.set_unmet(_RETRIEVER, error.message)
        except RagError:
            continue
        else:
            readiness.set_met(_RETRIEVER)


async def _refresh(engine: AsyncEngine, metrics: GeneratorMetrics) -> None:
    while True:
        metrics.refresh(
            engine.workers, questions_per_second=engine.answers_per_second, retried=engine.num_retried
        )
        await asyncio.sleep(_REFRESH_S)


def _show_workers(engine: AsyncEngine, readiness: Readiness) -> None:
    if engine.num_ready:
        readiness.set_met(_WORKERS)
    else:
        readiness.set_unmet(_WORKERS, "no worker is ready: " + ", ".join(w.device for w in engine.workers))


def _retrieval(settings: GeneratorSettings, checkpoint: Checkpoint, ready: Ready) -> RetrievalClient | None:
    if not settings.retriever_address:
        return None
    expected = Expected(
        embedding_model=checkpoint.embedding_model,
        context_tokenizer_digest=checkpoint.generator_tokenizer.digest,
        dimension=ready.retrieval_vector_size,
        metric=settings.index_metric,
    )
    return RetrievalClient(settings.retriever_address, expected, max_message_bytes=settings.max_message_bytes)


def _limits(settings: GeneratorSettings, ready: Ready) -> RequestLimits:
    return RequestLimits(
        max_batch_size=settings.max_batch_size,
        max_n_docs=settings.max_n_docs,
        max_num_beams=settings.max_num_beams,
        max_answer_length=settings.max_answer_length,
        max_question_chars=settings.max_question_chars,
        vocab_size=ready.vocab_size,
        max_positions=ready.max_positions,
        question_vocab_size=ready.question_vocab_size,
        question_max_length=ready.question_max_length,
    )


def _worker_options(settings: GeneratorSettings, source: ModelSource) -> list[WorkerOptions]:
    return [
        WorkerOptions(
            device=device,
            source=source,
            threads=settings.threads,
            cache_budget_bytes=settings.cache_budget_mib * 2**20,
            max_rows=settings.max_step_rows,
            max_context_tokens=settings.max_step_context_tokens,
            heartbeat_s=settings.heartbeat_s,
            log_level=settings.log_level,
            log_format=settings.log_format,
            max_forward_bytes=settings.max_forward_mib * 2**20,
            max_past_key_values=settings.max_past_key_values,
            past_key_values_bytes=settings.past_key_values_mib * 2**20,
            past_key_values_expires_s=settings.past_key_values_expires_s,
            batching=settings.batching,
            cuda_graphs=settings.cuda_graphs,
        )
        for device in settings.devices or default_devices()
    ]


if __name__ == "__main__":
    main()
