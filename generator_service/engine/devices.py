"""The devices of this machine."""

from __future__ import annotations

import torch


def default_devices() -> tuple[str, ...]:
    """Every CUDA device, or the CPU where there is none."""
    count = torch.cuda.device_count()
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
