"""Metadata filters as plain mappings, in the usual operators, turned into the contract's tree.

{"language": "en"}                                      equality; several keys must all hold
{"year": {"$gte": 1990, "$lt": 2000}}                   a range: $gt, $gte, $lt, $lte
{"source": {"$in": ["wiki", "news"]}}                   membership; also $eq, $ne, $nin
{"$or": [{"language": "en"}, {"$not": {"year": 1990}}]} $and, $or, $not
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from rag.filter.v1 import filter_pb2

_BOUNDS = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}
_LISTS = {"$and": "all_of", "$or": "any_of"}


def metadata_filter(given: Mapping[str, Any] | filter_pb2.Filter) -> filter_pb2.Filter:
    """Returns the message. Raises ValueError or TypeError for what is no filter; the service checks the rest."""
    if isinstance(given, filter_pb2.Filter):
        return given
    if not hasattr(given, "items") or not given:
        raise TypeError(f"a filter is a mapping with at least one key, got {given!r}")
    try:
        return _all([_condition(str(key), value) for key, value in given.items()])
    except (DecodeError, RecursionError) as error:  # protobuf copies no message of more than 100 levels
        raise ValueError("the filter is nested too deep to be sent") from error


def _condition(key: str, value: Any) -> filter_pb2.Filter:
    if key in _LISTS:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise TypeError(f"{key} takes a list of filters, got {value!r}")
        filters = filter_pb2.Filters(filters=[metadata_filter(one) for one in value])
        if _LISTS[key] == "all_of":
            return filter_pb2.Filter(all_of=filters)
        return filter_pb2.Filter(any_of=filters)
    if key == "$not":
        return filter_pb2.Filter(negation=metadata_filter(value))
    if key.startswith("$"):
        raise ValueError(
            f"unknown operator {key!r}: {', '.join([*_LISTS, '$not'])} stand in place of a field"
        )
    if isinstance(value, Mapping):
        return _field_condition(key, value)
    return filter_pb2.Filter(equal=filter_pb2.Equal(field=key, value=_value(key, value)))


def _field_condition(field: str, operators: Mapping[str, Any]) -> filter_pb2.Filter:
    found: list[filter_pb2.Filter] = []
    bounds: dict[str, filter_pb2.Value] = {}
    for operator, value in operators.items():
        if operator in _BOUNDS:
            bounds[_BOUNDS[operator]] = _value(field, value)
        elif operator in {"$eq", "$ne"}:
            equal = filter_pb2.Filter(equal=filter_pb2.Equal(field=field, value=_value(field, value)))
            found.append(equal if operator == "$eq" else filter_pb2.Filter(negation=equal))
        elif operator in {"$in", "$nin"}:
            if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
                raise TypeError(f"{field}: {operator} takes a list of values, got {value!r}")
            values = [_value(field, one) for one in value]
            one_of = filter_pb2.Filter(one_of=filter_pb2.OneOf(field=field, values=values))
            found.append(one_of if operator == "$in" else filter_pb2.Filter(negation=one_of))
        else:
            known = ", ".join([*_BOUNDS, "$eq", "$ne", "$in", "$nin"])
            raise ValueError(f"{field}: unknown operator {operator!r}, known are {known}")
    if bounds:
        found.append(filter_pb2.Filter(range=filter_pb2.Range(field=field, **bounds)))
    if not found:
        raise ValueError(f"{field}: no operator")
    return _all(found)


def _all(filters: list[filter_pb2.Filter]) -> filter_pb2.Filter:
    if len(filters) == 1:
        return filters[0]
    return filter_pb2.Filter(all_of=filter_pb2.Filters(filters=filters))


def _value(field: str, value: Any) -> filter_pb2.Value:
    if isinstance(value, bool):
        return filter_pb2.Value(bool_value=value)
    if isinstance(value, int):
        return filter_pb2.Value(int_value=value)
    if isinstance(value, float):
        return filter_pb2.Value(double_value=value)
    if isinstance(value, str):
        return filter_pb2.Value(string_value=value)
    raise TypeError(f"{field}: a value is a string, a number or a truth value, got {value!r}")
