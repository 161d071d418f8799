"""The `rag` command: what it prints, and how it fails."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from rag_client import Provenance, TokenSource, provenance_views
from rag_client.cli import app
from rag_serving import errors
from tests.rag_client.fake_pair import FakePair, serving_in_thread

runner = CliRunner()


@pytest.fixture(scope="module")
def running() -> Iterator[FakePair]:
    with serving_in_thread() as pair:
        yield pair


@pytest.fixture
def pair(running: FakePair, monkeypatch: pytest.MonkeyPatch) -> FakePair:
    monkeypatch.setenv("RAG_CLIENT_GENERATOR", running.address)
    monkeypatch.setenv("RAG_CLIENT_RETRIEVER", running.address)
    monkeypatch.setenv("COLUMNS", "110")
    running.generator.error = None
    running.generator.requests.clear()
    return running


def test_ask_prints_the_answer_its_probability_and_its_documents(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "Which is the capital of France?", "--n-docs", "2"])
    assert result.exit_code == 0, result.output
    assert "Paris   p = 77.9%, log p = -0.250" in result.output
    assert "1.8%  -4.000" in result.output
    assert "Paris has been the capital of…  (France)" in result.output
    assert "75.0%" in result.output
    assert "Europe [sic]" in result.output
    assert "lyon" in result.output
    assert "RAG_TOKEN, 2 documents" in result.output
    request = pair.generator.requests[0]
    assert request.include_documents
    assert request.retrieval_config.n_docs == 2
    assert (request.generation_config.num_beams, request.generation_config.num_return_sequences) == (4, 3)


def test_ask_says_when_the_strategy_is_not_the_checkpoint_s(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "q", "--strategy", "RAG_SEQUENCE", "--num-beams", "1"])
    assert "RAG_SEQUENCE (not the checkpoint's own)" in result.output
    assert pair.generator.requests[0].generation_config.num_return_sequences == 1


def test_ask_colours_words_by_document_unless_told_not_to(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "q"])
    assert "  paris  " in result.output
    assert pair.generator.requests[0].include_provenance
    assert "  paris  " not in runner.invoke(app, ["ask", "q", "--no-provenance"]).output
    line = provenance_views.coloured_tokens(
        Provenance(np.zeros((2, 2), np.float32), [token("pa", 0, 0.75), token("ris", 1, 0.25)])
    )
    assert [(line.plain[s.start : s.end], str(s.style)) for s in line.spans] == [
        ("pa", provenance_views.colour(0)),
        ("ris", f"{provenance_views.colour(1)} dim"),
    ]


def token(text: str, document: int, probability: float) -> TokenSource:
    return TokenSource(5, text, document, probability, None, 0, 1, 0.5)


def test_ask_says_that_it_abstains_and_from_what(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "q", "--abstain-below", "0.9"])
    assert result.exit_code == 0
    assert "no answer   the best one has only p = 77.9%" in result.output
    assert pair.generator.requests[0].abstain_below == 0.9


def test_explain_shows_what_each_document_gives(pair: FakePair) -> None:
    result = runner.invoke(app, ["explain", "q", "paris"])
    assert result.exit_code == 0, result.output
    request = pair.generator.requests[0]
    assert list(request.target_texts.texts) == ["paris"]
    assert request.generate.include_documents
    assert [
        line.split()[-3:] for line in result.output.splitlines() if "France" in line or "Europe" in line
    ] == [
        ["-3.250", "-3.000", "lyon"],
        ["-0.125", "+0.125", "Paris"],
    ]
    found = json.loads(runner.invoke(app, ["explain", "q", "--json"]).output)
    assert found["explanations"][0]["left_out"][0]["answer_differs"] is True


def test_ask_prints_json(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "q", "--json"])
    answer = json.loads(result.output)["answers"][0]
    assert answer["hypotheses"][0]["span"]["text"] == "Paris"
    assert answer["documents"][0]["doc_score"] == 2.0


def test_retrieve_and_score_print_their_numbers(pair: FakePair) -> None:
    result = runner.invoke(app, ["retrieve", "q"])
    assert result.exit_code == 0
    assert "France" in result.output
    assert json.loads(runner.invoke(app, ["retrieve", "q", "--json"]).output)["n_docs"] == 1
    result = runner.invoke(app, ["score", "q", "paris", "[b]lyon[/b]"])
    assert [line.split(maxsplit=1) for line in result.output.splitlines()] == [
        ["-1.000", "paris"],
        ["-2.000", "[b]lyon[/b]"],
    ]


def test_status_shows_both_sides(pair: FakePair) -> None:
    result = runner.invoke(app, ["status"])
    assert result.exit_code == 0
    assert result.output.count(" SERVING") == 2
    assert "RagTokenForGeneration" in result.output
    assert "Flat" in result.output


def test_status_fails_where_a_side_is_down(pair: FakePair) -> None:
    result = runner.invoke(app, ["status", "--retriever", "127.0.0.1:1", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["health"]["rag.retriever.v1.RetrieverService"] == "UNREACHABLE"


def test_a_server_that_is_down_is_one_line(pair: FakePair) -> None:
    result = runner.invoke(app, ["ask", "q", "--generator", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr == "rag: no generator at 127.0.0.1:1: is the pair running? try make run\n"
    result = runner.invoke(app, ["retrieve", "q", "--retriever", "127.0.0.1:1"])
    assert result.stderr == "rag: no retriever at 127.0.0.1:1: is the pair running? try make run\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.InvalidArgumentError("retrieval_config.n_docs", "must be positive", -1),
            "rag: retrieval_config.n_docs: must be positive, got -1\n",
        ),
        (
            errors.UnavailableError("the retriever is down", 2),
            "rag: UNAVAILABLE: the retriever is down (try again in 2 s)\n",
        ),
        (errors.FailedPreconditionError("no fit"), "rag: FAILED_PRECONDITION: no fit\n"),
    ],
)
def test_an_error_of_the_service_is_one_line(pair: FakePair, error: Exception, line: str) -> None:
    pair.generator.error = error
    result = runner.invoke(app, ["ask", "q"])
    assert (result.exit_code, result.stderr) == (1, line)


def test_a_wrong_variable_is_explained(pair: FakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_CLIENT_TIMEOUT_S", "soon")
    result = runner.invoke(app, ["ask", "q"])
    assert result.exit_code == 2
    assert "RAG_CLIENT_TIMEOUT_S" in result.stderr
