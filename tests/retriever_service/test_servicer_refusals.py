"""rag.retriever.v1 over a loopback port: what it refuses, by the name of the field."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.filter.v1 import filter_pb2
from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag.tensor.v1 import tensor_pb2
from tests.retriever_service.servicer_calls import DIM, request, tensor, violated_fields
from tests.retriever_service.tiny_models import bpe_tokenizer

Serve = Callable[..., AbstractAsyncContextManager[Any]]


def _raw(**fields: Any) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(**({"dtype": 1, "shape": [1, DIM], "data": bytes(4 * DIM)} | fields))


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"question_hidden_states": None}, "question_hidden_states"),
    "no dtype": ({"question_hidden_states": _raw(dtype=0)}, "question_hidden_states"),
    "unknown dtype": ({"question_hidden_states": _raw(dtype=99)}, "question_hidden_states"),
    "wrong dtype": ({"question_hidden_states": tensor([[1] * DIM], np.int64)}, "question_hidden_states"),
    "short data": ({"question_hidden_states": _raw(data=b"abc")}, "question_hidden_states"),
    "no shape": ({"question_hidden_states": _raw(shape=[])}, "question_hidden_states"),
    "negative shape": ({"question_hidden_states": _raw(shape=[-1, -DIM])}, "question_hidden_states"),
    "huge shape": ({"question_hidden_states": _raw(shape=[2**62, 4])}, "question_hidden_states"),
    "three dimensions": ({"question_hidden_states": _raw(shape=[1, 1, DIM])}, "question_hidden_states"),
    "empty batch": ({"question_hidden_states": tensor(np.zeros((0, DIM)))}, "question_hidden_states"),
    "dimension": ({"question_hidden_states": tensor(np.zeros((3, 7)))}, "question_hidden_states"),
    "NaN": ({"question_hidden_states": tensor(np.full((3, DIM), np.nan))}, "question_hidden_states"),
    "infinity": ({"question_hidden_states": tensor(np.full((3, DIM), -np.inf))}, "question_hidden_states"),
    "large batch": ({"question_hidden_states": tensor(np.zeros((33, DIM)))}, "question_hidden_states"),
    "negative n_docs": ({"n_docs": -1}, "n_docs"),
    "n_docs above the service's": ({"n_docs": 51}, "n_docs"),
    "contexts above the service's": (
        {
            "n_docs": 50,
            "question_hidden_states": tensor(np.zeros((5, DIM))),
            "question_texts": document_pb2.QuestionTexts(texts=["q"] * 5),
        },
        "n_docs",
    ),
    "no question": ({"question_texts": None}, "question"),
    "fewer texts": ({"question_texts": document_pb2.QuestionTexts(texts=["a"])}, "question_texts.texts"),
    "long text": (
        {"question_texts": document_pb2.QuestionTexts(texts=["a", "b", "x" * 5001])},
        "question_texts.texts[2]",
    ),
    "ids of another batch": ({"question_input_ids": tensor([[1]], np.int64)}, "question_input_ids"),
    "ids of floats": ({"question_input_ids": tensor([[1]] * 3)}, "question_input_ids"),
    "id above the vocabulary": (
        {"question_input_ids": tensor([[1]] * 2 + [[9999]], np.int32)},
        "question_input_ids",
    ),
    "negative id": ({"question_input_ids": tensor([[1]] * 2 + [[-1]], np.int64)}, "question_input_ids"),
    "flat ids": ({"question_input_ids": tensor([1, 2, 3], np.int64)}, "question_input_ids"),
    "long ids": ({"question_input_ids": tensor(np.ones((3, 5001)), np.int64)}, "question_input_ids"),
    "unknown truncation": ({"truncation": 7}, "truncation"),
    "negative length": ({"max_combined_length": -5}, "max_combined_length"),
    "length without room": ({"max_combined_length": 2}, "max_combined_length"),
    "long prefix": ({"prefix": "x" * 5001}, "prefix"),
    "negative nprobe": (
        {"search_parameters": document_pb2.SearchParameters(nprobe=-1)},
        "search_parameters.nprobe",
    ),
    "negative ef_search": (
        {"search_parameters": document_pb2.SearchParameters(ef_search=-1)},
        "search_parameters.ef_search",
    ),
    "negative rescore_factor": (
        {"search_parameters": document_pb2.SearchParameters(rescore_factor=-1)},
        "search_parameters.rescore_factor",
    ),
    "rescore_factor above the service's": (
        {"search_parameters": document_pb2.SearchParameters(rescore_factor=1366)},
        "search_parameters.rescore_factor",
    ),
    "empty filter": ({"filter": filter_pb2.Filter()}, "filter"),
    "filter without a value": (
        {"filter": filter_pb2.Filter(equal=filter_pb2.Equal(field="a"))},
        "filter.equal.value",
    ),
    "threshold that is no number": ({"score_threshold": float("nan")}, "score_threshold"),
    "nprobe of a flat index": (
        {"search_parameters": document_pb2.SearchParameters(nprobe=1)},
        "search_parameters.nprobe",
    ),
    "vectors too long to score": (
        {"question_hidden_states": tensor(np.full((3, DIM), 3e38))},
        "question_hidden_states",
    ),
}


async def test_bad_requests_are_refused_by_field_and_the_next_one_works(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        for name, (fields, field) in BAD_REQUESTS.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                pytest.fail(f"{name}: answered {await stub.Retrieve(request(**fields))}")
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, caught.value.details())
            assert violated_fields(caught.value) == [field], name
            assert (await stub.Retrieve(request())).n_docs == 4


async def test_dimension_mismatch_names_both_values(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        with pytest.raises(grpc.aio.AioRpcError, match="dimension 16, the questions have 7"):
            await stub.Retrieve(request(question_hidden_states=tensor(np.zeros((3, 7)))))


async def test_another_metric_than_expected_is_refused_with_both_names(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        fitting = document_pb2.Expectation(metric=document_pb2.METRIC_INNER_PRODUCT)
        await stub.Retrieve(request(expectation=fitting))
        for wrong, name in ((document_pb2.METRIC_L2, "METRIC_L2"), (77, "77")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Retrieve(request(expectation=document_pb2.Expectation(metric=wrong)))  # type: ignore[arg-type]
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            said = caught.value.details()
            assert said is not None
            assert name in said
            assert "METRIC_INNER_PRODUCT" in said


async def test_expectations_that_do_not_fit_are_refused_with_both_values(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        fits = {
            "embedding_model": "tiny-encoder",
            "context_tokenizer_digest": index.context_tokenizer_digest,
            "dimension": DIM,
        }
        await stub.Retrieve(request(expectation=document_pb2.Expectation(**fits)))
        await stub.Retrieve(request(expectation=document_pb2.Expectation()))
        await stub.GetIndex(
            retriever_service_pb2.GetIndexRequest(expectation=document_pb2.Expectation(**fits))
        )
        for field, wrong in (
            ("embedding_model", "other"),
            ("context_tokenizer_digest", "sha256:1"),
            ("dimension", 9),
        ):
            expectation = document_pb2.Expectation(**(fits | {field: wrong}))
            for refused in (
                stub.Retrieve(request(expectation=expectation)),
                stub.GetIndex(retriever_service_pb2.GetIndexRequest(expectation=expectation)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await refused
                assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                said = caught.value.details()
                assert said is not None
                assert field in said
                assert str(wrong) in said
                assert str(fits[field]) in said


async def test_input_ids_without_a_question_tokenizer_are_a_failed_precondition(
    serve_retriever: Serve, tmp_path: Path
) -> None:
    bpe_tokenizer().save_pretrained(tmp_path)
    ids = tensor([[1], [2], [3]], np.int64)
    async with serve_retriever(generator_checkpoint=str(tmp_path)) as (_, stub, _):
        with pytest.raises(grpc.aio.AioRpcError, match="no question tokenizer") as caught:
            await stub.Retrieve(request(question_input_ids=ids))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
