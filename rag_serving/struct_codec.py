"""google.protobuf.Struct <-> the JSON that it was made of."""

from typing import Any

from google.protobuf import json_format, struct_pb2


def decode(struct: struct_pb2.Struct) -> dict[str, Any]:
    """The object as JSON gives it: a Struct has doubles alone, and whole ones were integers where they came from.

    Raises ValueError or json_format.Error for what JSON has no words for, such as NaN.
    """
    return {name: _with_integers(one) for name, one in json_format.MessageToDict(struct).items()}


def _with_integers(value: Any) -> Any:
    match value:
        case dict():
            return {name: _with_integers(one) for name, one in value.items()}
        case list():
            return [_with_integers(one) for one in value]
        case float() if value.is_integer() and abs(value) < 2**53:
            return int(value)
    return value
