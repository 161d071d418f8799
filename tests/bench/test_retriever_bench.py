"""The retriever's benchmark, on a corpus of a few hundred documents and services that really run."""

import json
import sys
from pathlib import Path

import pytest

from bench.retriever import __main__ as program
from bench.retriever import direct


def test_every_part_gives_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = f"--docs 600 --dims 128 --kinds Flat --seconds 0.2 --folder {tmp_path} --json {rows_file}"
    for module in (program, direct):  # fewer than 64 clients would ask in earnest: these cores may be busy
        monkeypatch.setattr(module, "QUESTIONS_A_REQUEST", (2, 4))
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split(), "--parts", *program.PARTS])
    program.main()
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]
    figures = {row["figure"]: row["value"] for row in rows}
    assert {row["part"] for row in rows} == {
        *("throughput", "alone", "quality", "memory", "start", "hugging face", "changes")
    }
    assert figures["recall@5"] == 1.0
    assert figures["served rows that are faiss's"] == 1.0
    for how in ("search only", "with contexts, 2 questions a request", "search only, 4 questions a request"):
        for baseline in ("faiss", "faiss set up as served"):
            assert figures[f"served, {how}, to {baseline}"] > 0
    for each in ("", ", 2 questions a call", ", 4 questions a call"):
        assert figures[f"RagRetriever{each}, 64 threads"] > 0
        assert figures[f"served with contexts, nothing cached{each}, to RagRetriever"] > 0
    assert figures["durable upserts, batches of 100"] > 0
    assert figures["search while compacting again, p99 to idle, compacted"] > 0
    assert all(row["hardware"] and "--docs 600" in row["command"] for row in rows)
    assert [row["bar"] for row in rows if row["figure"] == "index mapped, first answer after"] == [
        "at most 5"
    ]
    assert not list(tmp_path.glob("*-changes-*")), "the copy that was changed is gone"
