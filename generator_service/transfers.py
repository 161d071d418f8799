"""Between host and device: nothing makes the host wait for the device but one reading for everybody who wants one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host values on the device, in the order of its work; from pinned memory, as any other would be waited for."""
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return host
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def to_host(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The groups' tensors on the host, after one wait for all; a CPU's come back as they are."""
    copies = [[t.to("cpu", non_blocking=True) for t in group] for group in groups]  # into pinned memory
    away = next((t.device for group in groups for t in group if t.device.type != "cpu"), None)
    if away is not None:
        wait_for(away)
    return copies


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
