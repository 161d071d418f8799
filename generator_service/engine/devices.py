"""What this machine, or the container it is, lets a worker use."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def default_devices() -> tuple[str, ...]:
    """Every CUDA device, or the CPU where there is none."""
    count = torch.cuda.device_count()
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of the machine, or the container's limit where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_word(cgroup / "memory.max")
    return min(machine, int(limit)) if limit.isdigit() else machine


def num_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on, or the container's quota, rounded up, where that is less."""
    cores = len(os.sched_getaffinity(0))
    quota = _first_word(cgroup / "cpu.max")
    if not quota.isdigit():
        return cores
    period = int((cgroup / "cpu.max").read_text().split()[1])
    return max(1, min(cores, math.ceil(int(quota) / period)))


def _first_word(file: Path) -> str:
    """Of a cgroup v2 file; "" where there is none, "max" where there is no limit."""
    try:
        return file.read_text().split()[0]
    except (OSError, IndexError):
        return ""
