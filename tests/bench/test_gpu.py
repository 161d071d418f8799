"""The benchmark of a CUDA device: it refuses to run elsewhere, and its fractions are of the floor."""

import sys

import pytest
import torch

from bench.micro import gpu, workload
from bench.micro.workload import Shape
from generator_service.types import Strategy


@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]])
def test_without_cuda_it_says_so_and_exits_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert "no CUDA device" in printed.err
    assert not printed.out


def test_a_fraction_is_the_speed_over_the_floors() -> None:
    assert gpu.fraction(500.0, 0.8) == pytest.approx(0.4)
    assert gpu.fraction(1000 / 3.8, 3.8) == pytest.approx(1.0)
    assert gpu.fraction(500.0, None) is None


@pytest.mark.parametrize(("name", "has_floor"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100", False)])
def test_both_sides_run_in_bfloat16_and_only_an_h100_has_a_floor(
    name: str, has_floor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workload.BART_SHAPES, "tiny", (1, 32, 2))
    monkeypatch.setattr(workload, "PADDED_LENGTH", 12)
    monkeypatch.setattr(gpu, "MODEL", "tiny")
    monkeypatch.setattr(gpu, "Shape", lambda: Shape(n_docs=2, context_length=9, num_beams=2, answer_length=3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    rows = list(gpu.measure([1, 2], torch.device("cpu"), graph_rows=0, repeat=1))
    assert [(r.strategy, r.batch) for r in rows] == [(s.value, b) for s in Strategy for b in (1, 2)]
    for row in rows:
        floor = gpu.FLOOR_MS[Strategy(row.strategy)].get(row.batch) if has_floor else None
        assert row.floor_fraction == gpu.fraction(row.ours_qps, floor)
        assert row.ratio == row.ours_qps / row.hf_qps
