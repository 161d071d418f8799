"""A device that counts how often the host waits for it: CPU tensors that say they are elsewhere.

As on a GPU, reading a value, choosing by a mask and copying from pageable memory make the host wait, and operations
whose tensors are not all here or all there fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from generator_service.model.backbone import Backbone, RowBatch, RowBlock
from generator_service.model.kv_cache import ContextStates, SelfCache

DEVICE = torch.device("meta")  # every build of torch knows it, and nobody holds data there

_COPIES = ("aten::to", "aten::_to_copy", "aten::copy_")
_READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class FarTensor(Tensor):
    """A tensor of DEVICE; near is where its values are."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Self:
        far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, _args: Sequence[Any] = (), _kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of a CountedDevice")


class CountedDevice(TorchDispatchMode):
    """While it is entered, tensors made on DEVICE are FarTensors; waits counts by the name of what waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def wait_for(self, device: torch.device) -> None:
        """Stands in for transfers.wait_for."""
        assert device == DEVICE
        self.waits["to_host"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, leaves = func._schema.name, tree_leaves((args, kwargs))
        far = [x for x in leaves if isinstance(x, FarTensor)]
        near = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FarTensor) and x.dim() > 0]
        wanted = next((x for x in leaves if isinstance(x, torch.device)), None)
        there = bool(far) if wanted is None else wanted == DEVICE
        if name in _COPIES:
            crosses = bool(far) != there or bool(far and near)
            if crosses and not _is_non_blocking(func, args, kwargs):
                self.waits[name] += 1
        else:
            assert not (far and near), f"{func} of tensors here and there"
            if far and (name in _READS or _chooses_by_mask(name, args)):
                self.waits[name] += 1
        out = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if not there:
            return out
        mutated = next((x for x in far if x.near is out), None)
        return mutated if mutated is not None else tree_map(_far, out)


class FarBackbone:
    """A backbone of the CPU as DEVICE would run it: what goes in and comes out is there, the rest out of sight."""

    def __init__(self, own: Backbone) -> None:
        self._own, self.name = own, own.name
        self.vocab_size, self.max_positions, self.page_slots = (
            own.vocab_size,
            own.max_positions,
            own.page_slots,
        )
        self.context_bytes, self.slot_bytes = own.context_bytes, own.slot_bytes

    def encode(self, contexts: Sequence[Tensor]) -> list[ContextStates]:
        return self._own.encode([_near(c) for c in contexts])

    def new_cache(self, num_contexts: int) -> SelfCache:
        return _FarCache(self._own.new_cache(num_contexts))

    def decode(self, batch: RowBatch) -> Tensor:
        blocks = [
            RowBlock(
                _near(b.token_ids),
                _near(b.positions),
                b.contexts,
                b.cache.own,
                _near(b.ancestry),
                b.cross_attention,
            )
            for b in batch.blocks
            if isinstance(b.cache, _FarCache)
        ]
        return FarTensor(self._own.decode(RowBatch(blocks)))

    def logits(self, states: Tensor) -> Tensor:
        return FarTensor(self._own.logits(_near(states)))


class _FarCache(SelfCache):
    def __init__(self, own: SelfCache) -> None:
        self.own = own

    def append(self, token_ids: Tensor, positions: Tensor) -> None:
        self.own.append(_near(token_ids), _near(positions))


def _near(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.near if isinstance(x, FarTensor) else x


def _far(x: Any) -> Any:
    return FarTensor(x) if isinstance(x, Tensor) else x


def _is_non_blocking(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    names = [a.name for a in func._schema.arguments]  # type: ignore[attr-defined]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("non_blocking", False))


def _chooses_by_mask(name: str, args: Sequence[Any]) -> bool:
    if not name.startswith("aten::index"):
        return False
    return any(isinstance(x, Tensor) and x.dtype is torch.bool for x in tree_leaves(args[1:2]))
