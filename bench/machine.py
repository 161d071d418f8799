"""The machine that a figure belongs to, in a line."""

import os
import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def describe(threads: int) -> str:
    """Processor, cores, torch and its threads."""
    return f"{_processor()}, {num_cores()} cores, torch {torch.__version__}, {threads} threads"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    """Its name, and where Linux tells them family and model: virtual machines call all of a maker's alike."""
    name = platform.processor() or platform.machine()
    if not _CPUINFO.exists():
        return name
    first = _CPUINFO.read_text("utf-8").split("\n\n", 1)[0]
    known = {
        key.strip(): value.strip() for key, _, value in (one.partition(":") for one in first.splitlines())
    }
    numbers = [f"{key.split()[-1]} {known[key]}" for key in ("cpu family", "model") if key in known]
    return " ".join([known.get("model name", name), *numbers])
