"""rag.filter.v1 on the wire: a message tree becomes a filter, or is refused by the path of its field."""

import math
from dataclasses import dataclass

from rag.filter.v1 import filter_pb2
from rag_serving.errors import InvalidArgumentError
from retriever_service.filters import AllOf, AnyOf, Equal, Filter, Not, OneOf, Range, Value, kind_of

MAX_FILTER_DEPTH = 16
MAX_FILTER_CONDITIONS = 128
MAX_FILTER_VALUES = 1000
_MAX_FIELD_CHARS = 256
_MAX_VALUE_CHARS = 4096
_BOUNDS = ("gt", "gte", "lt", "lte")


@dataclass(slots=True)
class _Budget:
    """What of a filter's size is left."""

    conditions: int = MAX_FILTER_CONDITIONS
    values: int = MAX_FILTER_VALUES

    def take_condition(self, path: str) -> None:
        self.conditions -= 1
        if self.conditions < 0:
            raise InvalidArgumentError(path, f"a filter has at most {MAX_FILTER_CONDITIONS} conditions")

    def take_value(self, path: str) -> None:
        self.values -= 1
        if self.values < 0:
            raise InvalidArgumentError(path, f"a filter has at most {MAX_FILTER_VALUES} values")


def read_filter(message: filter_pb2.Filter, path: str = "filter") -> Filter:
    """Returns the filter of a message. Raises InvalidArgumentError naming the path of what is wrong."""
    return _filter(message, path, MAX_FILTER_DEPTH, _Budget())


def _filter(message: filter_pb2.Filter, path: str, depth: int, budget: _Budget) -> Filter:
    if depth == 0:
        raise InvalidArgumentError(path, f"a filter is at most {MAX_FILTER_DEPTH} deep")
    budget.take_condition(path)
    condition = message.WhichOneof("condition")
    if condition is None:
        raise InvalidArgumentError(path, "has no condition")
    inside = f"{path}.{condition}"
    match condition:
        case "equal":
            field = _field(message.equal.field, inside)
            return Equal(field, _value(message.equal.value, f"{inside}.value", budget))
        case "range":
            return _range(message.range, inside, budget)
        case "one_of":
            return _one_of(message.one_of, inside, budget)
        case "all_of":
            return AllOf(_filters(message.all_of, inside, depth, budget))
        case "any_of":
            return AnyOf(_filters(message.any_of, inside, depth, budget))
        case "negation":
            return Not(_filter(message.negation, inside, depth - 1, budget))


def _filters(message: filter_pb2.Filters, path: str, depth: int, budget: _Budget) -> tuple[Filter, ...]:
    if not message.filters:
        raise InvalidArgumentError(f"{path}.filters", "is empty")
    return tuple(
        _filter(one, f"{path}.filters[{position}]", depth - 1, budget)
        for position, one in enumerate(message.filters)
    )


def _range(message: filter_pb2.Range, path: str, budget: _Budget) -> Range:
    field = _field(message.field, path)
    bounds: dict[str, Value] = {}
    for name in _BOUNDS:
        if not message.HasField(name):  # type: ignore[arg-type]
            continue
        inside = f"{path}.{name}"
        value = _value(getattr(message, name), inside, budget)
        if isinstance(value, bool):
            raise InvalidArgumentError(inside, "a bound is a number or a string", value)
        if bounds and kind_of(value) != kind_of(next(iter(bounds.values()))):
            raise InvalidArgumentError(inside, "bounds are all numbers or all strings", value)
        bounds[name] = value
    if not bounds:
        raise InvalidArgumentError(path, f"has none of {', '.join(_BOUNDS)}")
    return Range(field, **bounds)


def _one_of(message: filter_pb2.OneOf, path: str, budget: _Budget) -> OneOf:
    field = _field(message.field, path)
    if not message.values:
        raise InvalidArgumentError(f"{path}.values", "is empty")
    return OneOf(
        field,
        tuple(
            _value(value, f"{path}.values[{position}]", budget)
            for position, value in enumerate(message.values)
        ),
    )


def _field(field: str, path: str) -> str:
    path = f"{path}.field"
    if len(field) > _MAX_FIELD_CHARS:
        raise InvalidArgumentError(path, f"at most {_MAX_FIELD_CHARS} characters", len(field))
    if not all(field.split(".")):
        raise InvalidArgumentError(path, "must be a key of the metadata, or keys joined by dots", field)
    if not field.isprintable() or '"' in field or "\\" in field:
        raise InvalidArgumentError(path, "must be printable and without quotes and backslashes", field)
    return field


def _value(message: filter_pb2.Value, path: str, budget: _Budget) -> Value:
    budget.take_value(path)
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(path, "has no value")
    value: Value = getattr(message, kind)
    if isinstance(value, str) and len(value) > _MAX_VALUE_CHARS:
        raise InvalidArgumentError(path, f"at most {_MAX_VALUE_CHARS} characters", len(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgumentError(path, "must be finite", value)
    return value
