"""What the client sends, what it makes of the answers, and what it raises."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from rag.generator.v1 import generation_pb2
from rag.retriever.v1 import document_pb2
from rag_client import (
    GENERATOR_SERVICE,
    RETRIEVER_SERVICE,
    AnswerPiece,
    AsyncRagClient,
    BusyError,
    FieldViolation,
    Generation,
    Health,
    InvalidRequestError,
    NotFoundError,
    QuestionTokens,
    RagClient,
    RefusedError,
    ServiceError,
    Strategy,
    TimedOutError,
    UnavailableError,
    UnreachableError,
)
from rag_serving import errors, tensor_codec
from tests.rag_client.fake_pair import TEXT, FakePair, serving, serving_in_thread


@pytest.fixture
async def pair() -> AsyncIterator[FakePair]:
    async with serving() as fake:
        yield fake


@pytest.fixture
async def client(pair: FakePair) -> AsyncIterator[AsyncRagClient]:
    async with AsyncRagClient(pair.address, pair.address, timeout_s=20) as one:
        yield one


@pytest.fixture
def threaded() -> Iterator[FakePair]:
    with serving_in_thread() as fake:
        yield fake


async def test_generate_sends_every_option_under_its_name(client: AsyncRagClient, pair: FakePair) -> None:
    await client.generate(
        ["one", "two"],
        strategy="RAG_SEQUENCE",
        sequence_decoding="FAST",
        compatibility="HF",
        do_deduplication=False,
        exclude_bos_score=False,
        include_documents=True,
        n_docs=3,
        prefix="",
        max_combined_length=64,
        truncate_question_last=True,
        num_beams=4,
        early_stopping="never",
        bad_words_ids=[[1, 2], [3]],
        suppress_tokens=[9],
        forced_bos_token_id=-1,
        temperature=0.5,
        do_sample=True,
        top_k=None,
    )
    request = pair.generator.requests[0]
    assert list(request.question_texts.texts) == ["one", "two"]
    assert request.strategy == generation_pb2.STRATEGY_RAG_SEQUENCE
    assert request.sequence_decoding == generation_pb2.SEQUENCE_DECODING_FAST
    assert request.compatibility == generation_pb2.COMPATIBILITY_HF
    assert request.HasField("do_deduplication")
    assert not request.do_deduplication
    assert request.HasField("exclude_bos_score")
    assert request.include_documents
    retrieval = request.retrieval_config
    assert (retrieval.n_docs, retrieval.max_combined_length) == (3, 64)
    assert retrieval.HasField("prefix")
    assert retrieval.truncate_question_last
    config = request.generation_config
    assert (config.num_beams, config.temperature, config.do_sample) == (4, 0.5, True)
    assert config.early_stopping == generation_pb2.EARLY_STOPPING_NEVER
    assert [list(one.token_ids) for one in config.bad_words_ids] == [[1, 2], [3]]
    assert list(config.suppress_tokens) == [9]
    assert config.forced_bos_token_id == -1
    assert not config.HasField("top_k")


@pytest.mark.parametrize(
    ("given", "wire"),
    [
        (True, generation_pb2.EARLY_STOPPING_FIRST_COMPLETE),
        (False, generation_pb2.EARLY_STOPPING_HEURISTIC),
        (None, generation_pb2.EARLY_STOPPING_UNSPECIFIED),
    ],
)
async def test_early_stopping_speaks_hugging_face(
    client: AsyncRagClient, pair: FakePair, given: bool | None, wire: int
) -> None:
    await client.generate("q", early_stopping=given)
    assert pair.generator.requests[0].generation_config.early_stopping == wire


async def test_generate_returns_plain_data(client: AsyncRagClient) -> None:
    generation = await client.generate("Which is the capital of France?", include_documents=True)
    answer = generation.answers[0]
    assert answer.text == answer.best.answer == "Paris"
    assert answer.best.text == "paris"
    assert answer.best.token_ids == [2, 7, 3]
    assert answer.best.document_posterior == [0.75, 0.25]
    assert answer.hypotheses[1].span is None
    assert answer.hypotheses[1].answer == "lyon"
    assert [one.title for one in answer.documents] == ["France", "Europe [sic]"]
    assert answer.documents[0].text[answer.best.span.start : answer.best.span.end] == "Paris"  # type: ignore[union-attr]
    assert generation.strategy is Strategy.RAG_TOKEN
    assert generation.compatibility == "MASKED"
    assert generation.usage.context_tokens == 60
    assert generation.timings.total_s == pytest.approx(0.012)


async def test_generate_stream_gives_pieces_and_then_the_generation(
    client: AsyncRagClient, pair: FakePair
) -> None:
    stream = client.generate_stream("one", piece_tokens=3, piece_wait_s=0.5, num_beams=2, priority=-4)
    *pieces, generation = [event async for event in stream]
    (sent, _) = pair.generator.requests
    assert (sent.piece_tokens, sent.piece_wait_s) == (3, 0.5)
    assert sent.generate.generation_config.num_beams == 2
    assert sent.generate.priority == -4
    assert all(isinstance(piece, AnswerPiece) for piece in pieces)
    assert [(p.token_ids, p.text_delta, p.last) for p in pieces if isinstance(p, AnswerPiece)] == [
        ([7], "pa", False),
        ([3], "ris", True),
    ]
    assert generation == await client.generate("one")


async def test_a_stream_raises_as_a_call_does(client: AsyncRagClient, pair: FakePair) -> None:
    pair.generator.error = errors.UnavailableError("the worker is away", 0.2)
    with pytest.raises(UnavailableError):
        await anext(client.generate_stream("one"))
    with pytest.raises(TypeError, match="piece_tokens"):
        await anext(client.generate_stream("one", piece_token=3))  # type: ignore[call-arg]


def test_the_blocking_client_streams_and_may_stop_early(threaded: FakePair) -> None:
    with RagClient(threaded.address, timeout_s=20) as client:
        events = client.generate_stream("one")
        assert isinstance(next(events), AnswerPiece)
        del events
        assert [type(e) for e in client.generate_stream("one")] == [AnswerPiece, AnswerPiece, Generation]


async def test_tokens_and_contexts_travel_as_arrays(client: AsyncRagClient, pair: FakePair) -> None:
    ids = np.array([[5, 6, 0]], np.int32)
    await client.generate(QuestionTokens(ids, ids > 0))
    await client.generate_from_contexts(
        np.ones((4, 7), np.int64), np.ones((4, 7), bool), np.zeros((2, 2)), num_beams=2
    )
    tokens, contexts = (request for request in pair.generator.requests)
    np.testing.assert_array_equal(tensor_codec.decode(tokens.question_tokens.input_ids, "ids"), ids)
    mask = tensor_codec.decode(tokens.question_tokens.attention_mask, "mask")
    assert mask.tolist() == [[1, 1, 0]]
    assert tensor_codec.decode(contexts.contexts.doc_scores, "doc_scores").dtype == np.float32
    assert list(contexts.contexts.context_attention_mask.shape) == [4, 7]


async def test_an_unknown_option_is_refused_with_a_hint_before_anything_is_sent(
    client: AsyncRagClient, pair: FakePair
) -> None:
    wrong: Any = {"num_beam": 3}
    with pytest.raises(TypeError, match="unknown argument 'num_beam'; did you mean 'num_beams'"):
        await client.generate("q", **wrong)
    with pytest.raises(ValueError, match="strategy must be one of RAG_SEQUENCE, RAG_TOKEN, got 'RAG'"):
        await client.generate("q", strategy="RAG")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_beams"):
        await client.generate("q", num_beams="four")  # type: ignore[arg-type]
    assert pair.generator.requests == []


async def test_score_takes_texts_and_labels(client: AsyncRagClient, pair: FakePair) -> None:
    scores = await client.score(["a", "b"], ["x", "y"], reduce_loss=True, label_smoothing=0.1, n_docs=2)
    assert scores.log_likelihoods.tolist() == [-1.0, -2.0]
    assert scores.document_posterior.shape == (2, 2)
    await client.score("a", np.array([[4, 5]]))
    first, second = pair.generator.requests
    assert list(first.target_texts.texts) == ["x", "y"]
    assert first.reduce_loss
    assert first.retrieval_config.n_docs == 2
    assert list(second.labels.shape) == [1, 2]


async def test_retrieve_encodes_the_questions_first(client: AsyncRagClient, pair: FakePair) -> None:
    found = await client.retrieve(
        ["a", "b"], n_docs=2, nprobe=4, truncation="QUESTION_LAST", include_documents=True
    )
    request = pair.retriever.requests[0]
    assert list(request.question_hidden_states.shape) == [2, 2]
    assert list(request.question_texts.texts) == ["a", "b"]
    assert request.search_parameters.nprobe == 4
    assert request.truncation == document_pb2.TRUNCATION_QUESTION_LAST
    assert found.contexts().context_input_ids.shape == (4, 4)
    assert found.retrieved_doc_embeds is None


async def test_retrieved_documents_come_without_padding(client: AsyncRagClient) -> None:
    found = await client.retrieve(
        None, np.zeros((2, 2), np.float32), include_documents=True, skip_contexts=True
    )
    assert found.documents is not None
    assert [len(row) for row in found.documents] == [1, 2]
    assert found.doc_scores[0, 1] == -np.inf
    with pytest.raises(ValueError, match="skip_contexts"):
        found.contexts()


async def test_documents_index_and_model_are_described(client: AsyncRagClient) -> None:
    found = await client.get_documents(keys=["fr", "xx"], rows=[7])
    assert [one.text for one in found.documents] == [TEXT]
    assert (found.missing_keys, found.missing_rows) == (["xx"], [7])
    index = await client.get_index()
    assert (index.ntotal, index.metric, index.kind) == (2, "INNER_PRODUCT", "Flat")
    model = await client.get_model()
    assert model.default_strategy is Strategy.RAG_TOKEN
    assert model.default_generation_config == {"max_length": 20, "num_beams": 1}
    assert model.devices == ["cpu"]


async def test_health_tells_the_states_apart(client: AsyncRagClient, pair: FakePair) -> None:
    both = {GENERATOR_SERVICE, RETRIEVER_SERVICE}
    assert await client.health() == dict.fromkeys(both, Health.SERVING)
    pair.readiness.set_unmet("index", "swapping")
    await asyncio.sleep(0.05)
    assert await client.health() == dict.fromkeys(both, Health.NOT_SERVING)
    async with AsyncRagClient("127.0.0.1:1") as nobody:
        assert await nobody.health() == {GENERATOR_SERVICE: Health.UNREACHABLE}


async def test_a_bad_request_names_its_fields(client: AsyncRagClient, pair: FakePair) -> None:
    pair.generator.error = errors.InvalidArgumentError.of(
        [
            errors.FieldViolation("generation_config.num_beams", "must be positive, got 0"),
            errors.FieldViolation("retrieval_config.n_docs", "must be at most 50, got 90"),
        ]
    )
    with pytest.raises(InvalidRequestError) as caught:
        await client.generate("q", num_beams=0)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.field_violations == (
        FieldViolation("generation_config.num_beams", "must be positive, got 0"),
        FieldViolation("retrieval_config.n_docs", "must be at most 50, got 90"),
    )
    assert caught.value.address == pair.address


@pytest.mark.parametrize(
    ("raised", "expected", "reason"),
    [
        (errors.NotFoundError("no such"), NotFoundError, "NOT_FOUND"),
        (errors.FailedPreconditionError("no fit", reason="DIMENSION"), RefusedError, "DIMENSION"),
        (errors.DeadlineExceededError("late"), TimedOutError, "DEADLINE_EXCEEDED"),
        (errors.DataLossError("torn"), ServiceError, "DATA_LOSS"),
        (RuntimeError("secret"), ServiceError, "INTERNAL"),
    ],
)
async def test_each_status_has_its_error(
    client: AsyncRagClient, pair: FakePair, raised: Exception, expected: type[Exception], reason: str
) -> None:
    pair.generator.error = raised
    with pytest.raises(expected) as caught:
        await client.generate("q")
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert "secret" not in str(caught.value)


async def test_errors_that_pass_say_when_to_come_again(client: AsyncRagClient, pair: FakePair) -> None:
    pair.generator.error = errors.ResourceExhaustedError("queue full", 2.5, metadata={"queued": "64"})
    with pytest.raises(BusyError) as busy:
        await client.generate("q")
    assert busy.value.retry_after_s == 2.5
    assert busy.value.metadata == {"queued": "64"}
    pair.generator.error = errors.UnavailableError("the retriever is down", reason="RETRIEVER_DOWN")
    with pytest.raises(UnavailableError) as down:
        await client.generate("q", timeout_s=5)
    assert down.value.reason == "RETRIEVER_DOWN"
    assert not isinstance(down.value, UnreachableError)


async def test_nobody_at_the_address_is_told_from_a_service_in_trouble() -> None:
    async with AsyncRagClient("127.0.0.1:1", timeout_s=5) as client:
        with pytest.raises(UnreachableError) as caught:
            await client.get_model()
        assert caught.value.address == "127.0.0.1:1"
        assert caught.value.reason == ""
        with pytest.raises(ValueError, match="without a retriever_address"):
            await client.get_index()


async def test_a_call_ends_with_its_time(client: AsyncRagClient, pair: FakePair) -> None:
    pair.generator.delay_s = 10
    with pytest.raises(TimedOutError):
        await client.generate("q", timeout_s=0.1)


def test_the_blocking_client_is_shared_by_threads(threaded: FakePair) -> None:
    texts: list[str] = []
    with RagClient(threaded.address, threaded.address, timeout_s=20) as client:

        def ask() -> None:
            texts.append(client.generate("q").answers[0].text)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == ["Paris"] * 8
        assert client.encode_questions(["a", "b"]).shape == (2, 2)
        assert client.retrieve("a").contexts().doc_scores.shape == (1, 1)
        assert client.score("a", "x").log_likelihoods.tolist() == [-1.0]
        assert client.get_documents(keys=["fr"]).documents[0].title == "France"
        assert client.get_index().dimension == 2
        assert client.get_model().architecture == "RagTokenForGeneration"
        assert client.health()[GENERATOR_SERVICE] is Health.SERVING


def test_the_blocking_client_raises_the_same_errors_and_closes_twice(threaded: FakePair) -> None:
    client = RagClient(threaded.address, timeout_s=20)
    threaded.generator.error = errors.InvalidArgumentError("question_texts.texts[0]", "must not be empty", "")
    with pytest.raises(InvalidRequestError, match="question_texts"):
        client.generate("")
    client.close()
    client.close()
