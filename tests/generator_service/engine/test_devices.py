"""A container's limits count, not the machine's around it."""

from __future__ import annotations

import os
from pathlib import Path

from generator_service.engine.devices import memory_bytes, num_cores


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    machine = memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_bytes(tmp_path) == 1048576
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == machine


def test_a_containers_cpu_quota_counts(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert num_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert num_cores(tmp_path) == 1
