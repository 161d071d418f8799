"""Rows whose best tokens are wanted, and the table of them that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.transfers import to_device

BANNED = 4
"""Columns of Picks before the banned tokens."""


@dataclass(frozen=True)
class Pick:
    """A row whose best tokens are wanted, under all documents of its search.

    first: its row of the logits under the first document, step: rows to that under the next; search: its row of the
    priors; out: where its tokens go; banned: tokens that may not follow.
    """

    first: int
    step: int
    search: int
    out: int
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picks:
    """Picks as the kernels take them: int32 [picks, BANNED + most banned], -1 where there are fewer."""

    table: Tensor

    @classmethod
    def of(cls, picks: Sequence[Pick], device: torch.device) -> Picks:
        """On the device, without waiting for it."""
        most = max(len(p.banned) for p in picks)
        rows = [[p.first, p.step, p.search, p.out, *p.banned, *[-1] * (most - len(p.banned))] for p in picks]
        return cls(to_device(rows, torch.int32, device))
