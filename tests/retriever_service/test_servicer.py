"""rag.retriever.v1 over a loopback port: what it answers."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag.tensor.v1 import tensor_pb2
from tests.retriever_service.servicer_calls import (
    DIM,
    TEXTS,
    VECTORS,
    array,
    request,
    tensor,
    violated_fields,
)
from tests.retriever_service.tiny_models import bpe_tokenizer, embeddings_of, wordpiece_tokenizer

Serve = Callable[..., AbstractAsyncContextManager[Any]]


async def test_retrieve_answers_with_the_shapes_of_the_contract(
    serve_retriever: Serve, documents: Any
) -> None:
    async with serve_retriever() as (_, stub, _):
        answer = await stub.Retrieve(request(include_retrieved_doc_embeds=True, include_documents=True))
    rows, scores = array(answer.retrieved_doc_ids), array(answer.doc_scores)
    expected = VECTORS.astype(np.float64) @ embeddings_of(documents).T
    best = np.argsort(-expected, axis=1)[:, :4]
    np.testing.assert_array_equal(rows, best)
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, best, 1).astype(np.float32))
    np.testing.assert_array_equal(array(answer.retrieved_doc_embeds), embeddings_of(documents)[best])
    ids, mask = array(answer.context_input_ids), array(answer.context_attention_mask)
    assert ids.shape == mask.shape
    assert (ids.dtype, mask.dtype, rows.dtype, scores.dtype) == (np.int64, np.int64, np.int64, np.float32)
    assert len(ids) == 12
    assert mask.sum(axis=1).max() == ids.shape[1] <= 40
    assert [document.key for document in answer.documents] == [
        documents[row]["key"] for row in best.reshape(-1)
    ]
    assert answer.documents[0].text == documents[best[0, 0]]["text"]
    assert (list(answer.n_docs_found), answer.n_docs, answer.generation) == ([4, 4, 4], 4, 1)
    assert list(answer.question_truncated) == [False] * 3


async def test_optional_parts_are_left_out_unless_asked_for(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        answer = await stub.Retrieve(request(skip_contexts=True))
    assert not answer.HasField("context_input_ids")
    assert not answer.HasField("context_attention_mask")
    assert not answer.HasField("retrieved_doc_embeds")
    assert not answer.documents
    assert not answer.question_truncated


async def test_question_text_stands_verbatim_and_input_ids_as_their_tokenizer_decodes_them(
    serve_retriever: Serve,
) -> None:
    ids = wordpiece_tokenizer()(TEXTS, padding=True, return_tensors="np")["input_ids"]
    async with serve_retriever(max_combined_length=500) as (_, stub, _):
        as_text = await stub.Retrieve(request(n_docs=1))
        as_ids = await stub.Retrieve(request(n_docs=1, question_input_ids=tensor(ids, np.int32)))
    tokenizer = bpe_tokenizer()
    text = tokenizer.decode(array(as_text.context_input_ids)[0], skip_special_tokens=True)
    decoded = tokenizer.decode(array(as_ids.context_input_ids)[0], skip_special_tokens=True)
    assert text.endswith(" // Who was king ?")
    assert decoded.endswith(" // who was king?")


async def test_prefix_and_truncation_of_the_request_are_followed(serve_retriever: Serve) -> None:
    async with serve_retriever(prefix="own: ") as (_, stub, _):
        own = await stub.Retrieve(request(n_docs=1))
        given = await stub.Retrieve(request(n_docs=1, prefix="given: ", max_combined_length=20))
        empty = await stub.Retrieve(request(n_docs=1, prefix=""))
        last = await stub.Retrieve(
            request(n_docs=1, truncation=document_pb2.TRUNCATION_QUESTION_LAST, max_combined_length=10)
        )
    tokenizer = bpe_tokenizer()
    first = [tokenizer.decode(array(one.context_input_ids)[0]) for one in (own, given, empty)]
    assert first[0].startswith("<s>own: ")
    assert first[1].startswith("<s>given: ")
    assert "own" not in first[2]
    assert array(given.context_input_ids).shape[1] == 20
    assert list(last.question_truncated) == [True] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
async def test_half_precision_questions_are_searched_in_float32(serve_retriever: Serve, dtype: Any) -> None:
    async with serve_retriever() as (_, stub, _):
        answer = await stub.Retrieve(request(question_hidden_states=tensor(VECTORS, dtype)))
        same = await stub.Retrieve(request(question_hidden_states=tensor(VECTORS.astype(dtype), np.float32)))
    assert answer == same


async def test_bfloat16_questions_are_accepted(serve_retriever: Serve) -> None:
    upper = (VECTORS.view(np.uint32) >> 16).astype("<u2")
    wire = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BFLOAT16, shape=VECTORS.shape, data=upper.tobytes())
    rounded = (upper.astype(np.uint32) << 16).view(np.float32)
    async with serve_retriever() as (_, stub, _):
        answer = await stub.Retrieve(request(question_hidden_states=wire))
        assert answer == await stub.Retrieve(request(question_hidden_states=tensor(rounded)))


async def test_get_index_describes_index_and_assembly(serve_retriever: Serve) -> None:
    async with serve_retriever(title_sep=" | ") as (retriever, stub, _):
        index = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
    assert (index.ntotal, index.dimension, index.metric) == (60, DIM, document_pb2.METRIC_INNER_PRODUCT)
    assert (index.kind, index.generation, index.embedding_model) == ("Flat", 1, "tiny-encoder")
    assert (index.title_sep, index.doc_sep, index.prefix) == (" | ", " // ", "")
    assert (index.max_combined_length, index.default_n_docs, index.max_n_docs) == (40, 5, 50)
    assert index.context_tokenizer_digest == retriever.assembler.tokenizer.digest


async def test_get_documents_keeps_the_order_and_names_what_is_missing(serve_retriever: Serve) -> None:
    async with serve_retriever() as (_, stub, _):
        answer = await stub.GetDocuments(
            retriever_service_pb2.GetDocumentsRequest(
                keys=["doc-7", "nope", "doc-2", "doc-7"], rows=[59, 60, 0, -1, 2**62]
            )
        )
        found = [(document.row, document.key) for document in answer.documents]
        assert found == [(7, "doc-7"), (2, "doc-2"), (7, "doc-7"), (59, "doc-59"), (0, "doc-0")]
        assert list(answer.missing_keys) == ["nope"]
        assert list(answer.missing_rows) == [60, -1, 2**62]
        for bad, field in (({}, "keys"), ({"keys": ["a"] * 21}, "keys"), ({"rows": [1] * 21}, "rows")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(**bad))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert violated_fields(caught.value) == [field]


@pytest.mark.parametrize("backend", ["local"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "knob", "widest"), [("IVF8,Flat", "nprobe", 8), ("HNSW4", "ef_search", 100)]
)
async def test_a_request_widens_its_own_search_and_no_other(
    serve_retriever: Serve,
    tmp_path: Path,
    corpus: Path,
    build_corpus: Callable[..., Any],
    kind: str,
    knob: str,
    widest: int,
) -> None:
    build_corpus(corpus, tmp_path / "index", kind=kind, **{knob: 1})
    build_corpus(corpus, tmp_path / "flat")
    questions = tensor(np.random.default_rng(3).standard_normal((20, DIM)))

    async def scores(stub: Any, parameters: dict[str, int]) -> Any:
        asked = retriever_service_pb2.RetrieveRequest(
            question_hidden_states=questions,
            n_docs=5,
            skip_contexts=True,
            search_parameters=document_pb2.SearchParameters(**parameters),
        )
        return array((await stub.Retrieve(asked)).doc_scores)

    async with serve_retriever(index_folder=tmp_path / "flat") as (_, stub, _):
        exact = await scores(stub, {})
    async with serve_retriever(index_folder=tmp_path / "index") as (_, stub, _):
        narrow, wide, again = await asyncio.gather(
            scores(stub, {}), scores(stub, {knob: widest}), scores(stub, {})
        )
    np.testing.assert_allclose(wide, exact, rtol=1e-5)
    assert (narrow < exact - 1e-3).any()
    np.testing.assert_array_equal(narrow, again)


async def test_many_clients_at_once_each_get_their_own_answer(serve_retriever: Serve, documents: Any) -> None:
    vectors = np.random.default_rng(3).standard_normal((64, DIM)).astype(np.float32)
    best = np.argsort(-(vectors.astype(np.float64) @ embeddings_of(documents).T), axis=1)
    async with serve_retriever(batch_window_ms=50) as (_, stub, metrics):

        async def ask(row: int) -> Any:
            texts = document_pb2.QuestionTexts(texts=[f"question {row}"])
            question = tensor(vectors[row : row + 1])
            return await stub.Retrieve(
                request(question_hidden_states=question, question_texts=texts, n_docs=1 + row % 3)
            )

        answers = await asyncio.gather(*(ask(row) for row in range(64)))
        searches = metrics.registry.get_sample_value("rag_retriever_search_batch_questions_count")
        questions = metrics.registry.get_sample_value("rag_retriever_search_batch_questions_sum")
        assert metrics.registry.get_sample_value("rag_retriever_questions_in_flight") == 0
    for row, answer in enumerate(answers):
        np.testing.assert_array_equal(array(answer.retrieved_doc_ids)[0], best[row, : 1 + row % 3])
    assert questions == 64
    assert searches < 64


async def test_deadline_of_a_request_ends_it_and_not_the_others(
    serve_retriever: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    async with serve_retriever() as (retriever, stub, _):
        search = retriever.index.search

        def slow(*arguments: Any) -> Any:
            time.sleep(0.2)
            return search(*arguments)

        monkeypatch.setattr(retriever.index, "search", slow)
        patient = asyncio.ensure_future(stub.Retrieve(request()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Retrieve(request(), timeout=0.05)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await patient).n_docs == 4


async def test_damage_found_while_serving_is_data_loss(
    serve_retriever: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_retriever() as (retriever, stub, _):
        monkeypatch.setattr(retriever.store, "documents_by_row", lambda rows, replaced: {})
        with pytest.raises(grpc.aio.AioRpcError, match="which the store does not have") as caught:
            await stub.Retrieve(request())
        assert caught.value.code() == grpc.StatusCode.DATA_LOSS
        monkeypatch.undo()
        await stub.Retrieve(request())
