"""The figures of make eval-demo, from answers made by hand."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from demo.calibration_report import reliability_plot, write_report
from demo.evaluate import figures, figures_table, invented_table, write_figures
from demo.invented import COUNTRIES, Verdict
from demo.settings import EvaluateSettings
from rag_client import Answer, AnswerSpan, Hypothesis, RetrievedDocument, Strategy
from rag_client.calibration import calibration
from rag_client.evaluate import Calibrations
from rag_client.question_file import Question, read_questions

QUESTIONS = [
    Question("What is Peru's capital?", ["Lima"], ["peru"], "seen", "q1"),
    Question("How high is Cuzco?", ["3,400 metres"], ["peru"], "unseen", "q2"),
    Question("Who led Ghana?", ["Kwame Nkrumah"], ["ghana"], "unseen", "q3"),
]


def answer(text: str, *keys: str, span: str = "") -> Answer:
    where = AnswerSpan(0, 0, len(span), span) if span else None
    documents = [RetrievedDocument(key, row, key, "", 0.0, 0.5) for row, key in enumerate(keys)]
    return Answer([Hypothesis([], text, 0.0, 0.0, [], where)], documents, len(keys))


ANSWERS = [
    answer("lima", "peru", "chile", span="Lima"),
    answer("3, 400 metres", "chile", "peru"),
    answer("nkrumah", "togo"),
]


def test_each_split_is_counted_then_all() -> None:
    rows = figures(Strategy.RAG_TOKEN, QUESTIONS, ANSWERS)
    assert [(row.split, row.questions) for row in rows] == [("seen", 1), ("unseen", 2), ("all", 3)]
    assert [row.exact_match for row in rows] == pytest.approx([1.0, 0.5, 2 / 3])
    assert [row.recall for row in rows] == pytest.approx([1.0, 0.5, 2 / 3])
    assert [row.f1 for row in rows] == pytest.approx([1.0, (1 + 2 / 3) / 2, (2 + 2 / 3) / 3])
    assert figures_table(rows, {"RAG_TOKEN": 2.0}).row_count == 3


def test_an_invented_country_is_right_by_its_capital_alone() -> None:
    right, wrong = Verdict(COUNTRIES[0], "tarnesk", "Veldoria"), Verdict(COUNTRIES[1], "Selwin", "Osmaria")
    assert right.is_right
    assert not wrong.is_right
    assert invented_table([right, wrong]).title == "invented countries: 1 of 2 right"
    for one in COUNTRIES:
        assert one.capital in one.text
        assert one.capital not in one.question


def test_no_invented_country_stands_in_the_corpus() -> None:
    corpus = EvaluateSettings().corpus.read_text("utf-8")
    assert not [one.title for one in COUNTRIES if one.title in corpus or one.capital in corpus]


def test_the_file_holds_the_figures_and_how_they_were_measured(tmp_path: Path) -> None:
    settings = EvaluateSettings(num_beams=2)
    rows = figures(Strategy.RAG_SEQUENCE, QUESTIONS, ANSWERS)
    write_figures(tmp_path / "figures.json", settings, rows, [Verdict(COUNTRIES[0], "Tarnesk", "Veldoria")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["num_beams"] == 2
    assert [row["split"] for row in written["rows"]] == ["seen", "unseen", "all"]
    assert written["invented"][0]["is_right"] is True


def test_the_questions_of_the_repository_are_readable() -> None:
    questions = read_questions(EvaluateSettings().questions)
    assert len(questions) >= 200
    assert len({one.id for one in questions}) == len(questions)


def test_the_report_shows_every_bin_and_both_errors(tmp_path: Path) -> None:
    documents = calibration([0.95, 0.9, 0.05, 0.02], [True, False, False, False])
    answers = calibration([0.55], [True])
    both = Calibrations(documents, answers)
    write_report(tmp_path, {"RAG_TOKEN": both}, questions=3, num_beams=4, n_docs=2)
    text = (tmp_path / "calibration.md").read_text()
    assert "its 3 questions with 4 beams, 2 documents" in text
    assert "| 0.9 to 1.0 | 2 | 0.925 | 0.500 |" in text
    assert f"error **{documents.expected_error:.3f}**" in text
    assert "| 0.5 to 0.6 | 1 | 0.550 | 1.000 |" in text
    drawn = ET.fromstring((tmp_path / "calibration-rag-token.svg").read_text())
    circles = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert len(circles) == len(documents.bins) + len(answers.bins)
    assert reliability_plot(both) == (tmp_path / "calibration-rag-token.svg").read_text()
