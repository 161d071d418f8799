"""Bytes that are no message of the contract, sent to both services: refused like any other bad input."""

import re
import time
from typing import Any

import grpc
import numpy as np
import pytest

from rag.filter.v1 import filter_pb2
from rag.generator.v1 import generator_service_pb2, generator_service_pb2_grpc
from rag.retriever.v1 import retriever_service_pb2, retriever_service_pb2_grpc
from rag_client import RagClient
from rag_serving.tensor_codec import encode
from tests.integration.conftest import TinyPair
from tests.integration.services import Service
from tests.integration.test_refusals import fields_refused
from tests.integration.tiny_pair import DIMENSION

GARBAGE = b"\xff\xff\xff\xff"
GENERATOR = "/rag.generator.v1.GeneratorService"
RETRIEVER = "/rag.retriever.v1.RetrieverService"


def nest(given: filter_pb2.Filter, depth: int) -> None:
    """Fills a filter in its place: protobuf copies none that is too deep."""
    for _ in range(depth):
        given = given.negation
    given.equal.field = "number"
    given.equal.value.int_value = 1


def generate(depth: int) -> generator_service_pb2.GenerateRequest:
    request = generator_service_pb2.GenerateRequest()
    request.question_texts.texts.append("ti")
    nest(request.retrieval_config.filter, depth)
    return request


def retrieve(depth: int) -> retriever_service_pb2.RetrieveRequest:
    states = encode(np.zeros((1, DIMENSION), np.float32))
    request = retriever_service_pb2.RetrieveRequest(question_hidden_states=states, skip_contexts=True)
    nest(request.filter, depth)
    return request


def stream(depth: int) -> generator_service_pb2.GenerateStreamRequest:
    request = generator_service_pb2.GenerateStreamRequest()
    request.generate.question_texts.texts.append("ti")
    nest(request.generate.retrieval_config.filter, depth)
    return request


METHODS = [
    ("unary_unary", f"{RETRIEVER}/Retrieve", retrieve(200).SerializeToString()),
    ("unary_unary", f"{RETRIEVER}/Retrieve", GARBAGE),
    ("stream_stream", f"{RETRIEVER}/UpsertDocuments", GARBAGE),
    ("unary_unary", f"{GENERATOR}/Generate", generate(200).SerializeToString()),
    ("unary_unary", f"{GENERATOR}/Generate", GARBAGE),
    ("unary_stream", f"{GENERATOR}/GenerateStream", stream(200).SerializeToString()),
    ("unary_stream", f"{GENERATOR}/Forward", GARBAGE),
    ("unary_unary", f"{GENERATOR}/Explain", GARBAGE),
]


def refusals(service: Service, method: str) -> float:
    """How many calls of a method the service has counted as refused."""
    line = re.compile(rf'_rpcs_total{{code="INVALID_ARGUMENT",method="{re.escape(method)}"}} (\S+)')
    found = line.search(service.get("/metrics")[1])
    return float(found.group(1)) if found else 0.0


@pytest.mark.parametrize(("kind", "method", "data"), METHODS)
def test_what_cannot_be_parsed_names_the_request_and_is_counted(
    pair: TinyPair, client: RagClient, kind: str, method: str, data: bytes
) -> None:
    service = pair.generator if method.startswith(GENERATOR) else pair.retriever
    before = refusals(service, method)
    with grpc.insecure_channel(service.grpc) as channel:
        multi: Any = getattr(channel, kind)(method)

        def call(message: bytes, timeout: float) -> Any:
            answer = multi(iter([message]) if kind == "stream_stream" else message, timeout=timeout)
            return list(answer) if kind.endswith("stream") else answer

        assert fields_refused(call, data) == ["request"]
    for _ in range(100):  # the caller may know before the service has counted
        if refusals(service, method) > before:
            break
        time.sleep(0.05)
    assert refusals(service, method) == before + 1
    assert client.generate("ti", max_length=8).answers


def test_a_filter_at_the_edge_of_what_can_be_parsed_is_refused_too(pair: TinyPair) -> None:
    """Each message about it takes one of protobuf's 100 levels, and on the way to the retriever these change."""
    with (
        grpc.insecure_channel(pair.generator.grpc) as one,
        grpc.insecure_channel(pair.retriever.grpc) as other,
    ):
        generator: Any = generator_service_pb2_grpc.GeneratorServiceStub(one)
        retriever: Any = retriever_service_pb2_grpc.RetrieverServiceStub(other)
        for depth in range(94, 102):
            [field] = fields_refused(generator.Generate, generate(depth))
            assert field.startswith(("retrieval_config.filter", "request"))
            [field] = fields_refused(retriever.Retrieve, retrieve(depth))
            assert field.startswith(("filter", "request"))
