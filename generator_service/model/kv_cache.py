"""Keys and values that the decoder attends to: of contexts (immutable) and of its own rows (append-only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INITIAL_SLOTS = 32


@dataclass(frozen=True)
class ContextStates:
    """One encoded context, shared by every beam and candidate that reads it.

    keys, values: of all decoder layers [num_layers, heads, length, head_dim], or None for a backbone that keeps
        hidden states instead.
    hidden: the encoder's output [length, d_model] where the backbone needs it, else None.
    """

    length: int
    keys: Tensor | None
    values: Tensor | None
    hidden: Tensor | None

    @property
    def size_bytes(self) -> int:
        """Bytes held on the device."""
        return sum(
            t.numel() * t.element_size() for t in (self.keys, self.values, self.hidden) if t is not None
        )


class SelfCache:
    """Self-attention cache of the rows that share a set of contexts: append-only, never reordered.

    Each decoded row is one slot. Which slots a row may attend to (its ancestors and itself) is the caller's
    ancestry table, so a beam that moves costs a few bits, not a copy of its keys and values.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_contexts: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = (num_layers, num_contexts, heads, _INITIAL_SLOTS if num_layers else 0, head_dim)
        self.keys = torch.empty(self._shape, dtype=dtype, device=device)
        self.values = torch.empty(self._shape, dtype=dtype, device=device)
        self.token_ids = torch.empty(_INITIAL_SLOTS, dtype=torch.int64, device=device)  # [slots]
        self.positions = torch.empty(_INITIAL_SLOTS, dtype=torch.int64, device=device)  # [slots]
        self.num_slots = 0

    def append(self, token_ids: Tensor, positions: Tensor) -> None:
        """Reserve one slot a row; token_ids and positions are int64 [rows]."""
        end = self.num_slots + token_ids.shape[0]
        self._grow(end)
        self.token_ids[self.num_slots : end] = token_ids
        self.positions[self.num_slots : end] = positions
        self.num_slots = end

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the newest slots of a layer with [contexts, heads, rows, head_dim]; returns all slots in use."""
        start = self.num_slots - keys.shape[2]
        self.keys[layer, :, :, start : self.num_slots] = keys
        self.values[layer, :, :, start : self.num_slots] = values
        return self.keys[layer, :, :, : self.num_slots], self.values[layer, :, :, : self.num_slots]

    @property
    def size_bytes(self) -> int:
        """Bytes held on the device."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def _grow(self, slots: int) -> None:
        if slots > self.token_ids.shape[0]:
            capacity = max(slots, 2 * self.token_ids.shape[0])
            self.token_ids = _extended(self.token_ids, 0, capacity)
            self.positions = _extended(self.positions, 0, capacity)
        if self.keys.shape[0] and slots > self.keys.shape[3]:
            capacity = max(slots, 2 * self.keys.shape[3])
            self.keys = _extended(self.keys, 3, capacity)
            self.values = _extended(self.values, 3, capacity)


def _extended(tensor: Tensor, dim: int, capacity: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = capacity
    longer = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer
