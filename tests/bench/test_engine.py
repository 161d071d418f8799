"""The engine's benchmark: a row for each case, as a table and as JSON."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.micro import engine, workload
from bench.micro.workload import Shape


def test_every_case_is_a_row_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(workload.BART_SHAPES, "bart-base", (1, 32, 2))
    monkeypatch.setattr(workload, "PADDED_LENGTH", 12)
    shape = Shape(n_docs=2, context_length=9, num_beams=2, answer_length=3)
    monkeypatch.setattr(engine, "Shape", lambda: shape)
    file, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    flags = ["--quick", "--json", str(file), "--threads", "1", "--batches", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["engine", *flags])
    try:
        engine.main()
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cases = [("RAG_SEQUENCE", "MASKED"), ("RAG_SEQUENCE", "HF"), ("RAG_TOKEN", "MASKED")]
    assert [(row["batch"], row["strategy"], row["mode"], row["dtype"]) for row in rows] == [
        (batch, *case, dtype) for batch in (1, 2) for case in cases for dtype in ("float32", "int8")
    ]
    for row in rows:
        assert (row["model"], row["threads"], row["n_docs"], row["beams"]) == ("bart-base", 1, 2, 2)
        assert row["ours_qps"] > 0
        assert row["ratio"] == pytest.approx(row["ours_qps"] / row["hf_qps"])
    assert capsys.readouterr().out.count("bart-base") == len(rows)


def test_hugging_face_gets_each_question_padded_and_ours_gets_it_whole() -> None:
    shape = Shape(n_docs=2, context_length=9)
    asked = workload.questions(shape, 3, 50, 1)
    assert asked.input_ids.shape == (6, workload.PADDED_LENGTH)
    assert asked.attention_mask.sum(1).tolist() == [9] * 6
    assert (asked.input_ids[:, 9:] == 1).all()
