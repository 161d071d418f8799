"""GenerateStream over the wire: its pieces make the answer that Generate gives, and walking away frees the engine."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from rag.generator.v1 import generator_service_pb2, generator_service_pb2_grpc
from rag_client import (
    AnswerPiece,
    AsyncRagClient,
    Contexts,
    Generation,
    InvalidRequestError,
    RagClient,
    TimedOutError,
)
from rag_client.cli import app
from rag_client.messages import Input
from rag_client.options import GenerateOptions
from tests.integration.conftest import TinyPair
from tests.integration.services import Service
from tests.integration.test_pair import assert_same_answers
from tests.integration.tiny_pair import QUESTIONS, tokenizer
from tests.parity.tiny_models import tiny_rag

CASES: dict[str, GenerateOptions] = {
    "greedy": {"num_beams": 1, "max_length": 20, "min_length": 15},
    "beams": {"num_beams": 4, "max_length": 16, "num_return_sequences": 3, "length_penalty": 0.5},
    "beams that stop at the first": {"num_beams": 3, "max_length": 16, "early_stopping": True},
    "sampling": {"do_sample": True, "top_k": 0, "seed": 3, "max_length": 20},
    "several samples": {"do_sample": True, "top_k": 5, "seed": 4, "num_return_sequences": 3, "max_length": 9},
    "beam sampling": {"do_sample": True, "num_beams": 3, "seed": 5, "max_length": 12},
    "one token": {"max_length": 2, "num_beams": 1},
    "one document": {"num_beams": 3, "max_length": 12},
}
LONG: GenerateOptions = {"max_length": 60, "min_length": 60, "num_beams": 8, "strategy": "RAG_TOKEN"}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A T5 generator alone: its questions bring their contexts."""
    folder = tmp_path_factory.mktemp("t5")
    tiny_rag("t5", 2).generator.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    flags = ["--retriever-address=", "--default-strategy=RAG_TOKEN", "--devices=cpu", "--threads=1"]
    service = Service(
        "generator_service.main", [f"--generator={folder}", *flags], folder / "generator.log"
    ).wait_ready()
    try:
        yield service
    finally:
        assert service.stop() == 0


def contexts(n_docs: int) -> Contexts:
    """Two questions; where there are several documents, one of the second question's is not there."""
    numbers = np.random.default_rng(n_docs)
    scores = numbers.normal(size=(2, n_docs)).astype(np.float32)
    if n_docs > 1:
        scores[1, 1] = -np.inf
    return Contexts(numbers.integers(4, 50, size=(2 * n_docs, 9)), np.ones((2 * n_docs, 9), np.int64), scores)


def split(events: list[AnswerPiece | Generation]) -> tuple[list[AnswerPiece], Generation]:
    assert isinstance(events[-1], Generation)
    pieces = [event for event in events[:-1] if isinstance(event, AnswerPiece)]
    assert len(pieces) == len(events) - 1
    return pieces, events[-1]


def assert_pieces_make_the_answers(pieces: list[AnswerPiece], generation: Generation) -> None:
    for question, answer in enumerate(generation.answers):
        own = [piece for piece in pieces if piece.question == question]
        assert [t for piece in own for t in piece.token_ids] == answer.best.token_ids[1:]
        assert "".join(piece.text_delta for piece in own) == answer.best.text
        assert [piece.last for piece in own] == [False] * (len(own) - 1) + [True]
        for piece in own:
            assert piece.document_posterior.shape == (len(piece.token_ids), answer.n_docs)
            np.testing.assert_allclose(piece.document_posterior.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("case", CASES)
def test_pieces_make_the_answer_that_generate_gives(
    pair: TinyPair, t5: Service, family: str, case: str
) -> None:
    n_docs = 1 if case == "one document" else 3
    given: Input = QUESTIONS if family == "bart" and n_docs == 3 else contexts(n_docs)
    address = pair.generator.grpc if family == "bart" else t5.grpc
    options: GenerateOptions = {**CASES[case], "strategy": "RAG_TOKEN"}
    with RagClient(address, timeout_s=60) as client:
        whole = client.generate(given, **options)
        pieces, generation = split(
            list(client.generate_stream(given, piece_tokens=1, piece_wait_s=0, **options))
        )
    assert_same_answers(generation, whole)
    assert (generation.seed, generation.strategy) == (whole.seed, whole.strategy)
    assert_pieces_make_the_answers(pieces, generation)
    if case == "greedy":
        assert len(pieces) > len(generation.answers), "long answers come in several pieces"


def test_rag_sequence_comes_with_the_response_alone(client: RagClient) -> None:
    options: GenerateOptions = {"strategy": "RAG_SEQUENCE", "num_beams": 3, "max_length": 8}
    pieces, generation = split(list(client.generate_stream(QUESTIONS, **options)))
    assert pieces == []
    assert_same_answers(generation, client.generate(QUESTIONS, **options))


def test_pieces_are_as_long_as_asked_but_for_the_last(client: RagClient) -> None:
    options: GenerateOptions = {"strategy": "RAG_TOKEN", "max_length": 21, "min_length": 21}
    events = client.generate_stream("ti", piece_tokens=6, piece_wait_s=60.0, **options)
    pieces, generation = split(list(events))
    assert_pieces_make_the_answers(pieces, generation)
    assert all(len(piece.token_ids) >= 6 for piece in pieces[:-1])
    assert 2 <= len(pieces) <= 4


def running_questions(service: Service) -> float:
    text = service.get("/metrics")[1]
    return sum(float(value) for value in re.findall(r"questions_in_work{.*} (\S+)", text))


def wait_until_idle(service: Service) -> None:
    deadline = time.monotonic() + 20
    while running_questions(service) != 0:
        assert time.monotonic() < deadline, "questions that nobody waits for are still in work"
        time.sleep(0.1)


def test_a_caller_that_goes_away_mid_stream_or_runs_out_of_time_frees_the_engine(pair: TinyPair) -> None:
    with RagClient(pair.generator.grpc, timeout_s=60) as client:
        events = client.generate_stream(QUESTIONS * 20, piece_tokens=1, piece_wait_s=0, **LONG)
        with closing(events):  # type: ignore[type-var]
            assert isinstance(next(events), AnswerPiece)
        wait_until_idle(pair.generator)
        with pytest.raises(TimedOutError):
            list(client.generate_stream(QUESTIONS * 20, timeout_s=0.4, **LONG))
        wait_until_idle(pair.generator)
        assert client.generate("ti", max_length=4).answers


async def test_streams_and_calls_beside_each_other_answer_as_alone(pair: TinyPair) -> None:
    async with AsyncRagClient(pair.generator.grpc, timeout_s=60) as client:
        alone = [await client.generate(q, strategy="RAG_TOKEN", num_beams=3) for q in QUESTIONS]

        async def stream(question: str, priority: int) -> list[AnswerPiece | Generation]:
            events = client.generate_stream(
                question, strategy="RAG_TOKEN", num_beams=3, priority=priority, piece_tokens=1
            )
            return [event async for event in events]

        streams = [stream(question, priority) for priority in (-10, 0, 10) for question in QUESTIONS]
        calls = [client.generate(question, strategy="RAG_SEQUENCE", priority=5) for question in QUESTIONS]
        outcomes, _ = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*calls))
    for expected, events in zip(alone * 3, outcomes, strict=True):
        pieces, generation = split(events)
        assert_same_answers(generation, expected)
        assert_pieces_make_the_answers(pieces, generation)


def test_refusals_name_the_field_by_its_whole_path(pair: TinyPair, client: RagClient) -> None:
    for options, field in (
        ({"piece_tokens": 0}, "piece_tokens"),
        ({"piece_tokens": 1025}, "piece_tokens"),
        ({"piece_wait_s": -0.1}, "piece_wait_s"),
        ({"piece_wait_s": float("nan")}, "piece_wait_s"),
        ({"num_beams": 0}, "generate.generation_config.num_beams"),
        ({"priority": 11}, "generate.priority"),
        ({"n_docs": -1}, "generate.retrieval_config.n_docs"),
        ({"max_combined_length": 1}, "generate.retrieval_config.max_combined_length"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            list(client.generate_stream("ti", **options))  # type: ignore[arg-type]
        assert [one.field for one in refused.value.field_violations] == [field]
    with grpc.insecure_channel(pair.generator.grpc) as channel:
        stub = generator_service_pb2_grpc.GeneratorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as missing:
            list(stub.GenerateStream(generator_service_pb2.GenerateStreamRequest(), timeout=20))
    assert missing.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_the_rag_command_shows_an_answer_as_it_comes(pair: TinyPair, tmp_path: Path) -> None:
    runner = CliRunner()
    command = ["ask", QUESTIONS[0], "--stream", f"--generator={pair.generator.grpc}", "--num-beams=1"]
    shown = runner.invoke(app, command)
    assert shown.exit_code == 0, shown.stderr
    lines = runner.invoke(app, [*command, "--json"])
    assert lines.exit_code == 0, lines.stderr
    *pieces, generation = map(json.loads, lines.output.splitlines())
    best = generation["answers"][0]["hypotheses"][0]
    assert "".join(piece["text_delta"] for piece in pieces) == best["text"]
    assert best["text"] in shown.output
