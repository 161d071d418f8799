"""Objects come back from a Struct as JSON had them."""

from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2

from rag_serving import struct_codec


def struct(fields: dict[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(fields)
    return made


def test_whole_numbers_are_integers_again_wherever_they_stand() -> None:
    fields = {
        "year": 1984,
        "ratio": 0.5,
        "tags": ["a", 1, {"n": 2}],
        "inner": {"x": None, "y": True, "z": -3},
    }
    decoded = struct_codec.decode(struct(fields))
    assert decoded == fields
    assert [type(one) for one in (decoded["year"], decoded["ratio"], decoded["tags"][1])] == [int, float, int]
    assert type(decoded["tags"][2]["n"]) is int
    assert type(decoded["inner"]["y"]) is bool
    assert type(struct_codec.decode(struct({"x": 2.0**53}))["x"]) is float


def test_what_json_has_no_words_for_is_refused() -> None:
    with pytest.raises((ValueError, json_format.Error)):
        struct_codec.decode(struct({"x": float("nan")}))
