# ruff: noqa: N802  (methods are named by the contract)
"""Both services of the contract with canned answers, for the client to talk to."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rag.generator.v1 import (
    explanation_pb2,
    generation_pb2,
    generator_service_pb2,
    generator_service_pb2_grpc,
    provenance_pb2,
)
from rag.retriever.v1 import document_pb2, retriever_service_pb2, retriever_service_pb2_grpc
from rag_client import GENERATOR_SERVICE, RETRIEVER_SERVICE
from rag_serving import tensor_codec
from rag_serving.config import ServiceSettings
from rag_serving.health import Readiness
from rag_serving.metrics import Metrics
from rag_serving.server import GrpcServer

TEXT = "Paris has been the capital of France for centuries."
PROVENANCE = provenance_pb2.Provenance(
    token_posterior=tensor_codec.encode(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32)),
    tokens=[
        provenance_pb2.TokenSource(
            token_id=7,
            text="paris",
            document=0,
            probability=0.75,
            span=provenance_pb2.TextSpan(start=0, end=5),
        ),
        provenance_pb2.TokenSource(token_id=3, document=0, probability=0.5),
    ],
)


@dataclass
class FakeGenerator(generator_service_pb2_grpc.GeneratorServiceServicer):
    """Answers every question with paris; keeps the requests; raises `error` where one is set."""

    requests: list[Any] = field(default_factory=list)
    error: Exception | None = None
    delay_s: float = 0.0

    async def EncodeQuestions(self, request: Any, context: Any) -> Any:
        await self._heard(request)
        states = np.arange(2 * len(request.question_texts.texts), dtype=np.float32).reshape(-1, 2)
        return generator_service_pb2.EncodeQuestionsResponse(
            question_hidden_states=tensor_codec.encode(states)
        )

    async def Generate(self, request: Any, context: Any) -> Any:
        await self._heard(request)
        best = generation_pb2.Hypothesis(
            token_ids=[2, 7, 3],
            text="paris",
            score=-0.5,
            log_likelihood=-0.25,
            document_posterior=[0.75, 0.25],
            span=generation_pb2.AnswerSpan(document=0, start=0, end=5, text="Paris"),
            provenance=PROVENANCE if request.include_provenance else None,
        )
        abstained = request.abstain_below > 0.8
        other = generation_pb2.Hypothesis(token_ids=[2, 8, 3], text="lyon", log_likelihood=-4.0)
        documents = [
            generation_pb2.RetrievedDocument(
                key=key, row=row, title=title, text=TEXT, doc_score=2.0 - row, prior=0.5
            )
            for row, (key, title) in enumerate([("fr", "France"), ("eu", "Europe [sic]")])
        ]
        answer = generation_pb2.Answer(
            hypotheses=[] if abstained else [best, other],
            documents=documents if request.include_documents else [],
            n_docs=2,
            confidence=0.7788,
            abstained=abstained,
        )
        return generator_service_pb2.GenerateResponse(
            answers=[answer] * max(len(request.question_texts.texts), 1),
            strategy=request.strategy or generation_pb2.STRATEGY_RAG_TOKEN,
            strategy_differs_from_checkpoint=request.strategy == generation_pb2.STRATEGY_RAG_SEQUENCE,
            compatibility=generation_pb2.COMPATIBILITY_MASKED,
            seed=request.generation_config.seed,
            checkpoint_digest="sha256:abc",
            index_generation=3,
            usage=generation_pb2.Usage(question_tokens=5, context_tokens=60, generated_tokens=2),
            timings=generation_pb2.Timings(total_s=0.012),
        )

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._heard(request)
        for number, (text, last) in enumerate([("pa", False), ("ris", True)]):
            piece = generation_pb2.AnswerPiece(
                token_ids=[7 - 4 * number],
                text_delta=text,
                document_posterior=tensor_codec.encode(np.array([[0.75, 0.25]], np.float32)),
                last=last,
            )
            yield generator_service_pb2.GenerateStreamResponse(piece=piece)
        response = await self.Generate(request.generate, context)
        yield generator_service_pb2.GenerateStreamResponse(response=response)

    async def Explain(self, request: Any, context: Any) -> Any:
        await self._heard(request)
        response = await self.Generate(request.generate, context)
        best, other = response.answers[0].hypotheses
        best.provenance.CopyFrom(PROVENANCE)
        left_out = [
            explanation_pb2.LeftOut(
                document=0, log_likelihood=-3.25, change=-3.0, answer=other, answer_differs=True
            ),
            explanation_pb2.LeftOut(document=1, log_likelihood=-0.125, change=0.125, answer=best),
        ]
        explanation = explanation_pb2.Explanation(
            answer=best, left_out=left_out, documents=response.answers[0].documents, n_docs=2
        )
        return generator_service_pb2.ExplainResponse(explanations=[explanation], strategy=response.strategy)

    async def Score(self, request: Any, context: Any) -> Any:
        await self._heard(request)
        batch = max(len(request.target_texts.texts), 1)
        values = -np.arange(1, batch + 1, dtype=np.float32)
        both = np.full((batch, 2), 0.5, np.float32)
        return generator_service_pb2.ScoreResponse(
            log_likelihoods=tensor_codec.encode(values),
            loss=tensor_codec.encode(-values),
            document_posterior=tensor_codec.encode(both),
            doc_scores=tensor_codec.encode(both),
            strategy=generation_pb2.STRATEGY_RAG_TOKEN,
            index_generation=3,
        )

    async def GetModel(self, request: Any, context: Any) -> Any:
        await self._heard(request)
        return generator_service_pb2.GetModelResponse(
            architecture="RagTokenForGeneration",
            generator_type="bart",
            devices=["cpu"],
            default_strategy=generation_pb2.STRATEGY_RAG_TOKEN,
            default_generation_config=generation_pb2.GenerationConfig(max_length=20, num_beams=1),
        )

    async def _heard(self, request: Any) -> None:
        self.requests.append(request)
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error


@dataclass
class FakeRetriever(retriever_service_pb2_grpc.RetrieverServiceServicer):
    """Finds one document for the first question and two for each other; keeps the requests."""

    requests: list[Any] = field(default_factory=list)

    async def Retrieve(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        batch = request.question_hidden_states.shape[0]
        found = [1] + [2] * (batch - 1)
        columns = max(found)
        scores = np.zeros((batch, columns), np.float32)
        scores[0, 1:] = -np.inf
        rows = np.zeros((batch, columns), np.int64)
        response = retriever_service_pb2.RetrieveResponse(
            doc_scores=tensor_codec.encode(scores),
            retrieved_doc_ids=tensor_codec.encode(rows),
            n_docs_found=found,
            n_docs=columns,
            generation=3,
        )
        if request.include_documents:
            texts = [document_pb2.Document(key="fr", title="France", text=TEXT)] * (batch * columns)
            response.documents.extend(texts)
        if not request.skip_contexts:
            ids = tensor_codec.encode(np.ones((batch * columns, 4), np.int64))
            response.context_input_ids.CopyFrom(ids)
            response.context_attention_mask.CopyFrom(ids)
        return response

    async def GetDocuments(self, request: Any, context: Any) -> Any:
        known = [
            document_pb2.Document(key=key, title="France", text=TEXT) for key in request.keys if key == "fr"
        ]
        missing = [key for key in request.keys if key != "fr"]
        return retriever_service_pb2.GetDocumentsResponse(
            documents=known, missing_keys=missing, missing_rows=request.rows
        )

    async def GetIndex(self, request: Any, context: Any) -> Any:
        return retriever_service_pb2.GetIndexResponse(
            ntotal=2, dimension=2, metric=document_pb2.METRIC_INNER_PRODUCT, kind="Flat", generation=3
        )


@dataclass
class FakePair:
    """The two fakes, what makes them ready, and where they listen."""

    generator: FakeGenerator
    retriever: FakeRetriever
    readiness: Readiness
    address: str = ""


@asynccontextmanager
async def serving() -> AsyncIterator[FakePair]:
    """Both services on one port of the running event loop."""
    pair = FakePair(FakeGenerator(), FakeRetriever(), Readiness())
    server = GrpcServer(
        ServiceSettings(),
        service_names=[GENERATOR_SERVICE, RETRIEVER_SERVICE],
        readiness=pair.readiness,
        metrics=Metrics("test"),
    )
    generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(pair.generator, server.registrar)
    retriever_service_pb2_grpc.add_RetrieverServiceServicer_to_server(pair.retriever, server.registrar)
    await server.start()
    pair.address = f"127.0.0.1:{server.port}"
    try:
        yield pair
    finally:
        await server.stop()


@contextmanager
def serving_in_thread() -> Iterator[FakePair]:
    """The same on an event loop in another thread, for a client that blocks."""
    started: list[FakePair] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving() as pair:
            started.append(pair)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()
