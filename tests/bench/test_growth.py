"""How cost grows: every point is measured and drawn."""

from pathlib import Path

import pytest

from bench.load import checkpoint
from bench.load.in_process import InProcess
from bench.micro import growth
from bench.micro.growth import SWEEPS, Row
from generator_service.types import Strategy


def test_each_sweep_varies_its_own_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.SHAPES, "tiny", (1, 1, 32, 2, 2000))
    monkeypatch.setattr(growth, "STANDARD", {**growth.STANDARD, "context_length": 9, "answer_length": 3})
    sweeps = {"n_docs": (1, 5), "num_beams": (1, 4), "context_length": (5, 9), "answer_length": (3, 6)}
    monkeypatch.setattr(growth, "SWEEPS", sweeps)
    config = checkpoint.save("tiny", tmp_path)
    rows = list(growth.measure("tiny", InProcess.of_generator(tmp_path), config, 2, 1))
    assert len(rows) == 2 * 8
    assert all(row.qps > 0 for row in rows)
    for row in rows:
        others = {name: getattr(row, name) for name in sweeps if name != row.varied}
        assert others == {name: value for name, value in growth.STANDARD.items() if name != row.varied}
    standard = {row.qps for row in rows if row.strategy == "RAG_TOKEN" and row.n_docs == 5 and row.num_beams == 4
                and row.context_length == 9 and row.answer_length == 3}  # fmt: skip
    assert len(standard) == 1, "where the sweeps cross there is one figure"


def test_the_plot_has_each_sweep_and_equal_rows_give_an_equal_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row("tiny", strategy.value, 1, varied, **{**growth.STANDARD, varied: value}, qps=1 / value)
        for strategy in Strategy
        for varied, values in SWEEPS.items()
        for value in values
    ]
    for name in ("a.svg", "b.svg"):
        growth.plot(rows, "tiny", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    assert drawn == (tmp_path / "b.svg").read_text("utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in (*SWEEPS, "RAG_TOKEN", "RAG_SEQUENCE"))
