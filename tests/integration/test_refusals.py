"""Bad input to the running pair: refused with INVALID_ARGUMENT and the field's name, and the next request works."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rag.filter.v1 import filter_pb2
from rag.generator.v1 import generation_pb2, generator_service_pb2, generator_service_pb2_grpc
from rag.retriever.v1 import retriever_service_pb2, retriever_service_pb2_grpc
from rag.tensor.v1 import tensor_pb2
from rag_client import RagClient
from rag_serving.tensor_codec import encode
from tests.integration.conftest import TinyPair
from tests.integration.tiny_pair import DIMENSION

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def generator(pair: TinyPair) -> Iterator[Any]:
    with grpc.insecure_channel(pair.generator.grpc) as channel:
        yield generator_service_pb2_grpc.GeneratorServiceStub(channel)


@pytest.fixture(scope="module")
def retriever(pair: TinyPair) -> Iterator[Any]:
    with grpc.insecure_channel(pair.retriever.grpc) as channel:
        yield retriever_service_pb2_grpc.RetrieverServiceStub(channel)


def fields_refused(method: Any, request: Any) -> list[str]:
    with pytest.raises(grpc.RpcError) as caught:
        method(request, timeout=30)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    status = rpc_status.from_call(error)
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert all(one.description for one in bad_request.field_violations)
    return [one.field for one in bad_request.field_violations]


def texts(*questions: str) -> Change:
    def change(request: Any) -> None:
        request.question_texts.SetInParent()
        del request.question_texts.texts[:]
        request.question_texts.texts.extend(questions)

    return change


def generation(**values: Any) -> Change:
    return lambda request: request.generation_config.MergeFrom(generation_pb2.GenerationConfig(**values))


def retrieval(**values: Any) -> Change:
    return lambda request: request.retrieval_config.MergeFrom(generation_pb2.RetrievalConfig(**values))


def tokens(ids: Any, mask: Any = None) -> Change:
    def change(request: Any) -> None:
        request.question_tokens.input_ids.CopyFrom(encode(np.asarray(ids)))
        if mask is not None:
            request.question_tokens.attention_mask.CopyFrom(encode(np.asarray(mask)))

    return change


def contexts(**changed: Any) -> Change:
    """Two questions with two contexts each, but for what is changed: an array, a message, or None to leave out."""
    given = {
        "context_input_ids": np.full((4, 5), 7),
        "context_attention_mask": np.ones((4, 5), np.int64),
        "doc_scores": np.zeros((2, 2), np.float32),
        **changed,
    }

    def change(request: Any) -> None:
        request.contexts.SetInParent()
        for name, value in given.items():
            if value is not None:
                message = value if isinstance(value, tensor_pb2.Tensor) else encode(np.asarray(value))
                getattr(request.contexts, name).CopyFrom(message)

    return change


def enumeration(name: str, value: int) -> Change:
    return lambda request: setattr(request, name, value)


def torn(array: Any) -> tensor_pb2.Tensor:
    message = encode(np.asarray(array))
    message.data = message.data[:-1]
    return message


IDS = [[0, 9, 2]]
SCORES = "contexts.doc_scores"
BAD_GENERATE: list[tuple[str, Change]] = [
    ("input", lambda request: request.ClearField("question_texts")),
    ("question_texts.texts", texts()),
    ("question_texts.texts[1]", texts("ti", "  ")),
    ("question_texts.texts[0]", texts("bako " * 40)),
    ("question_texts.texts", texts(*["ti"] * 65)),
    ("question_tokens.input_ids", tokens([[0, 61, 2]])),
    ("question_tokens.input_ids", tokens([[0, -1, 2]])),
    ("question_tokens.input_ids", tokens([0, 9, 2])),
    ("question_tokens.input_ids", tokens(np.zeros((1, 0), np.int64))),
    ("question_tokens.input_ids", tokens(np.zeros((0, 3), np.int64))),
    ("question_tokens.input_ids", tokens(np.array([[0.0, 9.0]], np.float32))),
    ("question_tokens.attention_mask", tokens(IDS, [[1, 1]])),
    ("question_tokens.attention_mask[0]", tokens(IDS, [[0, 0, 0]])),
    ("question_tokens.attention_mask[0]", tokens(IDS, [[1, 0, 1]])),
    ("contexts.context_input_ids", contexts(context_input_ids=tensor_pb2.Tensor())),
    ("contexts.context_input_ids", contexts(context_input_ids=tensor_pb2.Tensor(dtype=99, shape=[1, 1]))),
    ("contexts.context_input_ids", contexts(context_input_ids=torn(np.full((4, 5), 7)))),
    ("contexts.context_input_ids", contexts(context_input_ids=np.full((3, 5), 7))),
    ("contexts.context_input_ids", contexts(context_input_ids=np.full((4, 5), 61))),
    ("contexts.context_input_ids", contexts(context_input_ids=np.full((4, 5), 1.0, np.float32))),
    (
        "contexts.context_input_ids",
        contexts(context_input_ids=np.full((4, 70), 7), context_attention_mask=np.ones((4, 70), np.int64)),
    ),
    ("contexts.context_attention_mask", contexts(context_attention_mask=None)),
    ("contexts.context_attention_mask", contexts(context_attention_mask=np.ones((4, 4), np.int64))),
    ("contexts.context_attention_mask[0]", contexts(context_attention_mask=np.full((4, 5), 2))),
    ("contexts.context_attention_mask[0]", contexts(context_attention_mask=np.zeros((4, 5), np.int64))),
    (SCORES, contexts(doc_scores=np.array([[0, np.nan], [0, 0]], np.float32))),
    (SCORES, contexts(doc_scores=np.array([[0, np.inf], [0, 0]], np.float32))),
    (SCORES, contexts(doc_scores=np.full((2, 2), -np.inf, np.float32))),
    (SCORES, contexts(doc_scores=np.zeros(4, np.float32))),
    (SCORES, contexts(doc_scores=np.zeros((0, 2), np.float32))),
    (SCORES, contexts(doc_scores=np.zeros((2, 2), np.int64))),
    ("priority", enumeration("priority", 11)),
    ("priority", enumeration("priority", -11)),
    ("retrieval_config.n_docs", retrieval(n_docs=-1)),
    ("retrieval_config.n_docs", retrieval(n_docs=101)),
    ("retrieval_config.nprobe", retrieval(nprobe=-1)),
    ("retrieval_config.rescore_factor", retrieval(rescore_factor=-1)),
    ("retrieval_config.rescore_factor", retrieval(rescore_factor=2**31 - 1)),
    ("retrieval_config.score_threshold", retrieval(score_threshold=float("nan"))),
    ("retrieval_config.filter", retrieval(filter=filter_pb2.Filter())),
    ("retrieval_config.max_combined_length", retrieval(max_combined_length=65)),
    ("strategy", enumeration("strategy", 9)),
    ("compatibility", enumeration("compatibility", 9)),
    ("sequence_decoding", enumeration("sequence_decoding", -1)),
    ("generation_config.early_stopping", generation(early_stopping=7)),
    ("generation_config.num_beams", generation(num_beams=0)),
    ("generation_config.num_beams", generation(num_beams=-3)),
    ("generation_config.num_beams", generation(num_beams=33)),
    ("generation_config.num_return_sequences", generation(num_beams=2, num_return_sequences=3)),
    ("generation_config.max_length", generation(max_length=1)),
    ("generation_config.max_length", generation(max_length=2**31 - 1)),
    ("generation_config.max_new_tokens", generation(max_new_tokens=0)),
    ("generation_config.min_length", generation(min_length=20, max_length=10)),
    ("generation_config.temperature", generation(temperature=0.0, do_sample=True)),
    ("generation_config.temperature", generation(temperature=float("nan"), do_sample=True)),
    ("generation_config.top_p", generation(top_p=1.5)),
    ("generation_config.top_k", generation(top_k=-1)),
    ("generation_config.length_penalty", generation(length_penalty=float("inf"))),
    ("generation_config.repetition_penalty", generation(repetition_penalty=0.0)),
    ("generation_config.decoder_start_token_id", generation(decoder_start_token_id=61)),
    ("generation_config.suppress_tokens", generation(suppress_tokens=[61])),
    (
        "generation_config.bad_words_ids[0].token_ids",
        generation(bad_words_ids=[generation_pb2.TokenSequence()]),
    ),
    (
        "generation_config.allowed_sequences[0].token_ids",
        generation(allowed_sequences=[generation_pb2.TokenSequence(token_ids=[-4])]),
    ),
]
BAD_SCORE: list[tuple[str, Change]] = [
    ("priority", enumeration("priority", 11)),
    ("input", lambda request: request.ClearField("question_texts")),
    ("target", lambda request: request.ClearField("target_texts")),
    ("target_texts.texts", lambda request: request.target_texts.texts.append("two")),
    ("labels", lambda request: request.labels.CopyFrom(encode(np.array([[61, 2]])))),
    ("labels", lambda request: request.labels.CopyFrom(encode(np.array([[9, 2], [9, 2]])))),
    ("labels", lambda request: request.labels.CopyFrom(encode(np.zeros((1, 0), np.int64)))),
    ("label_smoothing", lambda request: setattr(request, "label_smoothing", 1.0)),
    ("strategy", enumeration("strategy", 9)),
]
BAD_RETRIEVE: list[tuple[str, Change]] = [
    ("question_hidden_states", lambda request: request.ClearField("question_hidden_states")),
    (
        "question_hidden_states",
        lambda request: request.question_hidden_states.CopyFrom(encode(np.zeros((1, 5), np.float32))),
    ),
    (
        "question_hidden_states",
        lambda request: request.question_hidden_states.CopyFrom(
            encode(np.full((1, DIMENSION), np.nan, np.float32))
        ),
    ),
    (
        "question_hidden_states",
        lambda request: request.question_hidden_states.CopyFrom(encode(np.zeros((0, DIMENSION), np.float32))),
    ),
    ("question", lambda request: request.ClearField("question_texts")),
    ("question_texts.texts", texts("one", "two")),
    ("question_input_ids", lambda request: request.question_input_ids.CopyFrom(encode(np.array([[61]])))),
    ("n_docs", lambda request: setattr(request, "n_docs", -1)),
    ("n_docs", lambda request: setattr(request, "n_docs", 101)),
    ("truncation", enumeration("truncation", 9)),
    ("max_combined_length", lambda request: setattr(request, "max_combined_length", -1)),
    (
        "search_parameters.ef_search",
        lambda request: setattr(request.search_parameters, "ef_search", -1),
    ),
]


def named(cases: list[tuple[str, Change]]) -> list[Any]:
    return [
        pytest.param(field, change, id=f"{number}-{field}") for number, (field, change) in enumerate(cases)
    ]


@pytest.mark.parametrize(("field", "change"), named(BAD_GENERATE))
def test_generate_names_the_field_and_goes_on(generator: Any, field: str, change: Change) -> None:
    request = generator_service_pb2.GenerateRequest()
    texts("ti")(request)
    change(request)
    assert fields_refused(generator.Generate, request) == [field]
    good = generator_service_pb2.GenerateRequest()
    texts("ti")(good)
    good.generation_config.max_length = 3
    assert generator.Generate(good, timeout=30).answers[0].hypotheses


@pytest.mark.parametrize(("field", "change"), named(BAD_SCORE))
def test_score_names_the_field(generator: Any, field: str, change: Change) -> None:
    request = generator_service_pb2.ScoreRequest()
    texts("ti")(request)
    request.target_texts.texts.append("bako")
    change(request)
    assert fields_refused(generator.Score, request) == [field]


@pytest.mark.parametrize(("field", "change"), named(BAD_RETRIEVE))
def test_retrieve_names_the_field(retriever: Any, field: str, change: Change) -> None:
    request = retriever_service_pb2.RetrieveRequest(
        question_hidden_states=encode(np.zeros((1, DIMENSION), np.float32))
    )
    texts("ti")(request)
    change(request)
    assert fields_refused(retriever.Retrieve, request) == [field]


def test_encode_questions_and_get_documents_name_the_field(generator: Any, retriever: Any) -> None:
    nothing = generator_service_pb2.EncodeQuestionsRequest()
    assert fields_refused(generator.EncodeQuestions, nothing) == ["question"]
    too_long = generator_service_pb2.EncodeQuestionsRequest()
    texts("bako " * 40)(too_long)
    assert fields_refused(generator.EncodeQuestions, too_long) == ["question_texts.texts[0]"]
    assert fields_refused(retriever.GetDocuments, retriever_service_pb2.GetDocumentsRequest()) == ["keys"]


def test_what_only_the_retriever_can_refuse_is_an_error_of_the_retrieval_config(generator: Any) -> None:
    request = generator_service_pb2.GenerateRequest()
    texts("ti")(request)
    request.retrieval_config.max_combined_length = 1
    assert fields_refused(generator.Generate, request)[0].startswith("retrieval_config")


def test_a_document_that_is_not_there_needs_no_context(client: RagClient) -> None:
    """A retriever pads questions with fewer hits with -inf and empty rows: what it returns must be accepted."""
    found = client.retrieve(["ti", "bako"])
    both = found.contexts()
    mask, scores = both.context_attention_mask.copy(), both.doc_scores.copy()
    mask[2], scores[0, 2] = 0, -np.inf
    padded = client.generate_from_contexts(both.context_input_ids, mask, scores, max_length=8)
    two = client.retrieve("ti", n_docs=2).contexts()
    alone = client.generate(two, max_length=8).answers[0].best
    assert padded.answers[0].best.token_ids == alone.token_ids
    assert padded.answers[0].best.document_posterior == pytest.approx(
        [*alone.document_posterior, 0.0], abs=1e-5
    )
