"""The machine that a figure belongs to, in a line."""

import os
import platform
from pathlib import Path

import torch


def describe(threads: int) -> str:
    """Processor, cores, torch and its threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        name = next((one.split(":", 1)[1].strip() for one in lines if one.startswith("model name")), name)
    return f"{name}, {num_cores()} cores, torch {torch.__version__}, {threads} threads"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
