"""What beam searches and chains have in common: tensors over searches that join and leave."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SearchState:
    """State of searches of one shape; every tensor of a subclass begins with [searches]."""

    running: Tensor  # int64 [searches, hypotheses, length]: live hypotheses, start token first
    eos: Tensor  # int64 [searches, eos tokens], filled with -1

    @property
    def num_searches(self) -> int:
        """Searches in the state."""
        return int(self.running.shape[0])

    def select(self, index: Tensor) -> Self:
        """The searches at index, in its order."""
        fields = dataclasses.fields(self)
        return type(self)(**{f.name: getattr(self, f.name).index_select(0, index) for f in fields})

    def joined_by(self, other: Self) -> Self:
        """These searches and then the other's; shorter rows are padded."""
        joined = {}
        for field in dataclasses.fields(self):
            fill = -1 if field.name == "eos" else 0
            left, right = getattr(self, field.name), getattr(other, field.name)
            joined[field.name] = torch.cat(_same_widths(left, right, fill))
        return type(self)(**joined)


def _same_widths(left: Tensor, right: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    shape = [max(a, b) for a, b in zip(left.shape[1:], right.shape[1:], strict=True)]
    return _padded(left, shape, fill), _padded(right, shape, fill)


def _padded(tensor: Tensor, shape: list[int], fill: int) -> Tensor:
    if list(tensor.shape[1:]) == shape:
        return tensor
    wider = tensor.new_full((tensor.shape[0], *shape), fill)
    wider[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return wider
