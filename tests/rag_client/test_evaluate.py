"""`rag eval`: question files, figures and calibration, from answers made by hand and over the wire."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rag_client import Answer, Hypothesis, RetrievedDocument
from rag_client.cli import app
from rag_client.evaluate import calibrations, figures, holds_answer
from rag_client.question_file import Question, QuestionFileError, read_questions
from rag_serving import errors
from tests.rag_client.fake_pair import FakePair, serving_in_thread

runner = CliRunner()
QUESTION = {"question": "Which is the capital of France?", "answers": ["Paris"], "key": "fr"}


def document(key: str, text: str = "") -> RetrievedDocument:
    return RetrievedDocument(key, 0, "", text, 0.0, 0.5)


def answer(text: str, probability: float, *posterior: float) -> Answer:
    one = Hypothesis([], text, 0.0, math.log(probability), list(posterior), None)
    documents = [document(f"d{place}") for place in range(len(posterior))]
    return Answer([one], documents, len(posterior), probability)


def test_figures_count_abstentions_as_wrong_and_apart() -> None:
    questions = [Question("q", ["Lima"], ["d1"]), Question("r", ["Edo"], ["x"]), Question("s", ["Edo"])]
    silent = Answer([], [document("x")], 1, 0.1, abstained=True)
    found = figures(questions, [answer("lima", 0.9, 0.2, 0.8), silent, answer("the edo", 0.5, 1.0)])
    assert (found.questions, found.exact_match) == (3, pytest.approx(2 / 3))
    assert found.recall == pytest.approx(2 / 3)
    assert found.abstained == pytest.approx(1 / 3)


def test_calibrations_take_every_document_of_what_was_answered() -> None:
    questions = [Question("q", ["Lima"], ["d1"]), Question("r", ["Edo"], ["d0"]), Question("s", ["Edo"])]
    silent = Answer([], [document("x")], 1, 0.1, abstained=True)
    found = calibrations(questions, [answer("lima", 0.9, 0.2, 0.8), answer("kyoto", 0.4, 1.0), silent])
    assert found.documents.count == 3
    assert found.answers.count == 2
    # documents: 0.2 false, 0.8 true, 1.0 true; answers: 0.9 right, 0.4 wrong
    assert found.documents.expected_error == pytest.approx((0.2 + 0.2 + 0.0) / 3)
    assert found.answers.expected_error == pytest.approx((0.1 + 0.4) / 2)


def test_a_document_holds_an_answer_by_its_key_or_else_by_its_words() -> None:
    assert holds_answer(document("fr"), Question("q", ["x"], ["fr", "eu"]))
    assert not holds_answer(document("it", "x"), Question("q", ["x"], ["fr"]))
    assert holds_answer(document("it", "In Paris, they say"), Question("q", ["paris"]))
    assert not holds_answer(document("it", "comparison"), Question("q", ["paris"]))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", ":2 is not JSON"),
        ("[1]", ":2 is not a JSON object"),
        ('{"answers": ["a"]}', ':2: "question"'),
        ('{"question": "q"}', ':2: "answers"'),
        ('{"question": "q", "answers": []}', ':2: "answers"'),
        ('{"question": "q", "answers": ["a"], "keys": "k"}', ':2: "keys"'),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(QUESTION)}\n{line}\n", "utf-8")
    with pytest.raises(QuestionFileError, match=complaint):
        read_questions(file)
    result = runner.invoke(app, ["eval", str(file)])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_byte_order_mark_is_no_part_of_the_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(QUESTION), "utf-8-sig")
    assert [one.question for one in read_questions(file)] == [QUESTION["question"]]


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestionFileError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    with pytest.raises(QuestionFileError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")


@pytest.fixture(scope="module")
def running() -> Iterator[FakePair]:
    with serving_in_thread() as pair:
        yield pair


@pytest.fixture
def pair(running: FakePair, monkeypatch: pytest.MonkeyPatch) -> FakePair:
    monkeypatch.setenv("RAG_CLIENT_GENERATOR", running.address)
    monkeypatch.setenv("COLUMNS", "110")
    running.generator.error = None
    running.generator.requests.clear()
    return running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [QUESTION, QUESTION, {"question": "Who?", "answers": ["nobody"], "keys": ["it"]}]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return path


def test_eval_asks_every_question_and_prints_figures(pair: FakePair, file: Path) -> None:
    result = runner.invoke(app, ["eval", str(file), "--batch-size", "2", "--n-docs", "2"])
    assert result.exit_code == 0, result.output
    sent = [list(request.question_texts.texts) for request in pair.generator.requests]
    assert sorted(map(len, sent)) == [1, 2]
    assert all(request.include_documents for request in pair.generator.requests)
    assert "66.7%" in result.output
    assert result.output.count("expected calibration error") == 2


def test_eval_prints_json_alone(pair: FakePair, file: Path) -> None:
    result = runner.invoke(app, ["eval", str(file), "--json"])
    found = json.loads(result.output)
    assert found["figures"] == {
        "questions": 3,
        "exact_match": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "abstained": 0.0,
    }
    assert found["calibration"]["documents"]["count"] == 6
    assert [one["answer"] for one in found["answers"]] == ["Paris"] * 3


def test_eval_ends_with_one_line_where_the_service_refuses(pair: FakePair, file: Path) -> None:
    pair.generator.error = errors.FailedPreconditionError("no fit")
    result = runner.invoke(app, ["eval", str(file), "--json"])
    assert (result.exit_code, result.stderr) == (1, "rag: FAILED_PRECONDITION: no fit\n")
