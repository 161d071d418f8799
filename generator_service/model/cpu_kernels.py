"""cpu_kernels.cpp, called with tensors: float32 on the CPU, where the library was built and can be loaded."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_LANES = 16
"""A head's width is a multiple of this, or the attention here does not take it."""

_KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_ARGUMENTS = {
    "rag_quantize": "pnnppi",
    "rag_scale": "pnnppi",
    "rag_cross_attention": "pnppppnnfpi",
    "rag_self_attention": "pnnppnnpnnnfpi",
}

_logger = logging.getLogger(__name__)


@functools.cache
def library() -> Any:
    """The library, or None: without a compiler at installation there is none, and torch's own operations serve.

    Its OpenMP is the one that torch has loaded for all to see, so both run on the same threads.
    """
    spec = find_spec("generator_service.model._cpu_kernels")
    if spec is None or spec.origin is None:
        _logger.info("no cpu_kernels: they were not built at installation, torch's own operations serve")
        return None
    try:
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        _logger.warning("no cpu_kernels: %s; torch's own operations serve", error)
        return None
    for name, kinds in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes = [_KINDS[kind] for kind in kinds]
        function.restype = None
    return found


def can_attend(states: Tensor, head_dim: int) -> bool:
    """Whether the attention here takes such states."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and head_dim % _LANES == 0
        and library() is not None
    )


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, n] -> uint8 [rows, n], 128 more than the int8 of each, and scales float32 [rows, 1]."""
    rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=torch.uint8)
    scale = rows.new_empty((rows.shape[0], 1))
    library().rag_quantize(
        rows.data_ptr(), *rows.shape, out.data_ptr(), scale.data_ptr(), torch.get_num_threads()
    )
    return out, scale


def scale_(rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [rows, n] times scale [rows, 1] plus bias [n], in place."""
    library().rag_scale(
        rows.data_ptr(),
        *rows.shape,
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        torch.get_num_threads(),
    )
    return rows


def cross_attention(
    query: Tensor,
    contexts: Sequence[tuple[Tensor, Tensor]],
    rows: Sequence[int],
    layer: int,
    scale: float | None,
) -> Tensor:
    """Rows to their contexts: query [total rows, inner] -> the same.

    contexts holds keys and values of all layers as attention.cross_states lays them out, rows how many of the query's
    rows each context has.
    """
    heads, _, head_dim = contexts[0][0].shape[1:]
    query = query.contiguous()
    out = torch.empty_like(query)
    count = len(contexts)
    lengths = [keys.shape[2] for keys, _ in contexts]
    size = 4 * layer * heads * head_dim
    starts = [size * length for length in lengths]
    library().rag_cross_attention(
        query.data_ptr(),
        count,
        (ctypes.c_void_p * count)(
            *[keys.data_ptr() + at for (keys, _), at in zip(contexts, starts, strict=True)]
        ),
        (ctypes.c_void_p * count)(
            *[values.data_ptr() + at for (_, values), at in zip(contexts, starts, strict=True)]
        ),
        (ctypes.c_int64 * count)(*rows),
        (ctypes.c_int64 * count)(*lengths),
        heads,
        head_dim,
        _factor(scale, head_dim),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def self_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: int,
    mask: Tensor | None,
    scale: float | None,
    out: Tensor,
) -> None:
    """Rows to their ancestors; writes the rows' keys and values into the newest of the slots in use.

    qkv [contexts * rows, 3 * inner]; keys and values of one layer [contexts, heads, capacity, head_dim]; mask additive
    [1, heads or 1, rows, slots] or None; out [contexts * rows, inner]. All contiguous.
    """
    contexts, heads, capacity, head_dim = keys.shape
    rows = qkv.shape[0] // contexts
    library().rag_self_attention(
        qkv.data_ptr(),
        contexts,
        rows,
        keys.data_ptr(),
        values.data_ptr(),
        capacity,
        slots,
        None if mask is None else mask.data_ptr(),
        0 if mask is None or mask.shape[1] == 1 else rows * slots,
        heads,
        head_dim,
        _factor(scale, head_dim),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _factor(scale: float | None, head_dim: int) -> float:
    return float(head_dim**-0.5) if scale is None else scale
