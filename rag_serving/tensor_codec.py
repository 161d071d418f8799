"""Turns rag.tensor.v1 messages into numpy arrays and back, trusting nothing that the wire says."""

import math
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt

from rag.tensor.v1 import tensor_pb2
from rag_serving.errors import InvalidArgumentError

# Wire dtype -> its name and the little-endian numpy type of its bytes.
_DTYPES: dict[int, tuple[str, str]] = {
    tensor_pb2.DTYPE_FLOAT32: ("float32", "<f4"),
    tensor_pb2.DTYPE_FLOAT16: ("float16", "<f2"),
    tensor_pb2.DTYPE_BFLOAT16: ("bfloat16", "<u2"),
    tensor_pb2.DTYPE_INT32: ("int32", "<i4"),
    tensor_pb2.DTYPE_INT64: ("int64", "<i8"),
    tensor_pb2.DTYPE_BOOL: ("bool", "u1"),
}
_WIRE_TYPES: dict[str, tuple[tensor_pb2.Dtype.ValueType, str]] = {
    "float32": (tensor_pb2.DTYPE_FLOAT32, "<f4"),
    "float16": (tensor_pb2.DTYPE_FLOAT16, "<f2"),
    "int32": (tensor_pb2.DTYPE_INT32, "<i4"),
    "int64": (tensor_pb2.DTYPE_INT64, "<i8"),
    "bool": (tensor_pb2.DTYPE_BOOL, "?"),
}
# The same by numpy's type, in this machine's byte order: asking a type for its name is slow.
_NATIVE = {np.dtype(name): found for name, found in _WIRE_TYPES.items()}
_MAX_NDIM = 8
# Far above any message, far below what overflows numpy's sizes; guards shapes such as [2**62, 0].
_MAX_ELEMENTS = 1 << 40

FLOATS = frozenset({"float32", "float16", "bfloat16"})
INTEGERS = frozenset({"int32", "int64"})


def decode(
    tensor: tensor_pb2.Tensor,
    field: str,
    *,
    dtypes: AbstractSet[str] | None = None,
    ndim: int | None = None,
    finite: bool = False,
    max_elements: int | None = None,
    widen: bool = False,
) -> npt.NDArray[Any]:
    """Returns the tensor as a writable array in native byte order that shares no memory with the message.

    bfloat16 always becomes float32; `widen` makes float16 float32 and int32 int64 too. `dtypes` are the
    wire names allowed ("float32", "bfloat16", "int64" …), `ndim` the number of dimensions, `max_elements`
    a limit on the element count; `finite` refuses NaN and infinities.
    Raises InvalidArgumentError naming `field`.
    """
    name, wire_type = _checked_dtype(tensor, field, dtypes)
    shape = _checked_shape(tensor, field, ndim, max_elements)
    itemsize = np.dtype(wire_type).itemsize
    expected_bytes = math.prod(shape) * itemsize
    if len(tensor.data) != expected_bytes:
        raise InvalidArgumentError(
            field, f"data must hold {expected_bytes} bytes for {name} {list(shape)}", len(tensor.data)
        )
    raw = np.frombuffer(bytearray(tensor.data), dtype=wire_type).reshape(shape)
    array = _to_native(raw, name, field, widen=widen)
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        where = [int(axis[0]) for axis in np.nonzero(~np.isfinite(array))] if array.ndim else []
        raise InvalidArgumentError(field, f"must be finite, is {array[tuple(where)]} at {where}")
    return array


def encode(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """Returns the array as a message: float32, float16, int32, int64 or bool; any strides, any byte order.

    Raises TypeError for any other dtype: what leaves a service is chosen by the service.
    """
    found = _NATIVE.get(array.dtype) or _WIRE_TYPES.get(array.dtype.newbyteorder("=").name)
    if found is None:
        raise TypeError(f"a Tensor holds {', '.join(_WIRE_TYPES)}, not {array.dtype}")
    dtype, wire_type = found
    data = array.astype(wire_type, copy=False).tobytes(order="C")
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=data)


def _checked_dtype(tensor: tensor_pb2.Tensor, field: str, dtypes: AbstractSet[str] | None) -> tuple[str, str]:
    if tensor.dtype == tensor_pb2.DTYPE_UNSPECIFIED:
        raise InvalidArgumentError(field, "dtype is not set")
    known = _DTYPES.get(tensor.dtype)
    if known is None:
        raise InvalidArgumentError(field, "dtype is unknown", int(tensor.dtype))
    if dtypes is not None and known[0] not in dtypes:
        raise InvalidArgumentError(field, f"dtype must be one of {', '.join(sorted(dtypes))}", known[0])
    return known


def _checked_shape(
    tensor: tensor_pb2.Tensor, field: str, ndim: int | None, max_elements: int | None
) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if ndim is not None and len(shape) != ndim:
        raise InvalidArgumentError(field, f"must have {ndim} dimensions", list(shape[: _MAX_NDIM + 1]))
    if len(shape) > _MAX_NDIM:
        raise InvalidArgumentError(field, f"must have at most {_MAX_NDIM} dimensions", len(shape))
    if any(size < 0 for size in shape):
        raise InvalidArgumentError(field, "no dimension may be negative", list(shape))
    limit = _MAX_ELEMENTS if max_elements is None else max_elements
    if math.prod(shape) > limit or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise InvalidArgumentError(field, f"must have at most {limit} elements", list(shape))
    return shape


def _to_native(raw: npt.NDArray[Any], name: str, field: str, *, widen: bool) -> npt.NDArray[Any]:
    if name == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name == "bool":
        if raw.size and int(raw.max()) > 1:
            raise InvalidArgumentError(field, "bool elements must be bytes 0 or 1", int(raw.max()))
        return raw.view(np.bool_)
    if widen and name in {"float16", "int32"}:
        return raw.astype(np.float32 if name == "float16" else np.int64)
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)
