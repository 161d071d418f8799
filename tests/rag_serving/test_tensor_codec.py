"""The tensor codec: what it returns equals what was sent, and what does not fit is refused by name."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rag.tensor.v1 import tensor_pb2
from rag_serving import tensor_codec
from rag_serving.errors import InvalidArgumentError

WIRE_DTYPES = ["float32", "float16", "int32", "int64", "bool"]


def tensor(dtype: str, shape: list[int], data: bytes) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.Value(f"DTYPE_{dtype.upper()}"), shape=shape, data=data)


def any_array() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    return st.sampled_from(WIRE_DTYPES).flatmap(lambda dtype: arrays.arrays(np.dtype(dtype), shapes))


@given(any_array())
def test_decode_returns_what_encode_was_given(array: np.ndarray[Any, Any]) -> None:
    back = tensor_codec.decode(tensor_codec.encode(array), "x")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


@given(any_array())
def test_encode_is_little_endian_and_row_major_for_any_layout(array: np.ndarray[Any, Any]) -> None:
    big_endian = array.astype(array.dtype.newbyteorder(">"))
    assert tensor_codec.encode(big_endian) == tensor_codec.encode(array)
    assert tensor_codec.encode(array.copy(order="F")) == tensor_codec.encode(array)


@given(st.lists(st.integers(0, 0xFFFF), max_size=20))
def test_decode_bfloat16_is_the_float32_with_the_same_upper_bits(bits: list[int]) -> None:
    message = tensor("bfloat16", [len(bits)], np.array(bits, dtype="<u2").tobytes())
    back = tensor_codec.decode(message, "x")
    assert back.dtype == np.float32
    assert (back.view(np.uint32) == np.array(bits, dtype=np.uint32) << 16).all()


def test_decode_widens_float16_and_int32_only_when_asked() -> None:
    half = tensor_codec.encode(np.array([1.5], dtype=np.float16))
    small = tensor_codec.encode(np.array([-3], dtype=np.int32))
    assert tensor_codec.decode(half, "x").dtype == np.float16
    assert tensor_codec.decode(half, "x", widen=True).dtype == np.float32
    assert tensor_codec.decode(small, "x", widen=True).tolist() == [-3]
    assert tensor_codec.decode(small, "x", widen=True).dtype == np.int64


@given(
    st.integers(-1, 9),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10),
    st.binary(max_size=64),
    st.booleans(),
)
def test_decode_of_any_message_returns_its_shape_or_names_the_field(
    dtype: int, shape: list[int], data: bytes, finite: bool
) -> None:
    message = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    named: list[str] = []
    array = np.zeros(0)
    try:
        array = tensor_codec.decode(message, "question_hidden_states", finite=finite, max_elements=1000)
    except InvalidArgumentError as error:
        named = [one.field for one in error.violations]
    if named:
        assert named == ["question_hidden_states"]
    else:
        assert list(array.shape) == shape
        assert not finite or np.isfinite(array).all()


@pytest.mark.parametrize(
    ("message", "options", "words"),
    [
        (tensor_pb2.Tensor(), {}, "dtype is not set"),
        (tensor_pb2.Tensor(dtype=77, shape=[1], data=b"1234"), {}, "dtype is unknown, got 77"),
        (
            tensor("int64", [1], bytes(8)),
            {"dtypes": {"float32"}},
            "dtype must be one of float32, got 'int64'",
        ),
        (tensor("float32", [1], bytes(4)), {"ndim": 2}, "must have 2 dimensions, got [1]"),
        (tensor("float32", [1] * 9, bytes(4)), {}, "at most 8 dimensions"),
        (tensor("float32", [-1, -1], bytes(4)), {}, "no dimension may be negative"),
        (tensor("float32", [2, 2], bytes(15)), {}, "must hold 16 bytes for float32 [2, 2], got 15"),
        (tensor("float32", [2, 2], bytes(17)), {}, "must hold 16 bytes"),
        (tensor("float32", [2**62, 4], b""), {}, "elements"),
        (tensor("float32", [2**62, 2**62, 0], b""), {}, "elements"),
        (tensor("float32", [3], bytes(12)), {"max_elements": 2}, "at most 2 elements, got [3]"),
        (tensor("bool", [2], b"\x01\x02"), {}, "bytes 0 or 1, got 2"),
        (
            tensor_codec.encode(np.array([[0, 1], [np.nan, 0]], dtype=np.float32)),
            {"finite": True},
            "must be finite, is nan at [1, 0]",
        ),
        (tensor_codec.encode(np.array(np.inf, dtype=np.float16)), {"finite": True}, "must be finite, is inf"),
        (tensor("bfloat16", [1], b"\x80\x7f"), {"finite": True}, "must be finite, is inf at [0]"),
    ],
)
def test_decode_refuses(message: tensor_pb2.Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        tensor_codec.decode(message, "doc_scores", **options)
    assert str(caught.value).startswith("doc_scores: ")
    assert words in str(caught.value)


def test_decode_shares_no_memory_with_the_message() -> None:
    message = tensor_codec.encode(np.zeros(3, dtype=np.float32))
    tensor_codec.decode(message, "x")[:] = 7
    assert tensor_codec.decode(message, "x").tolist() == [0, 0, 0]


def test_encode_refuses_a_dtype_that_the_wire_lacks() -> None:
    with pytest.raises(TypeError, match="not float64"):
        tensor_codec.encode(np.zeros(1))
