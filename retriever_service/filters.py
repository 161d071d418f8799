"""Conditions on a document's metadata: the tree, and what it means for one document.

Two-valued throughout: a condition on a field that is missing, or holds a list, an object or another kind of
scalar, is false, and its negation true. Every backend that evaluates filters its own way is tested against
`matches`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool
"""A scalar of JSON; integers and floats are one kind, and bool is none of theirs."""


@dataclass(frozen=True, slots=True)
class Equal:
    """The field has this value."""

    field: str
    value: Value


@dataclass(frozen=True, slots=True)
class Range:
    """The field is within the bounds that are not None: all numbers, or all strings by code points."""

    field: str
    gt: Value | None = None
    gte: Value | None = None
    lt: Value | None = None
    lte: Value | None = None

    def bounds(self) -> list[tuple[str, Value]]:
        """Returns (SQL operator, value) of each bound that is given."""
        named = ((">", self.gt), (">=", self.gte), ("<", self.lt), ("<=", self.lte))
        return [(operator, value) for operator, value in named if value is not None]


@dataclass(frozen=True, slots=True)
class OneOf:
    """The field has one of these values."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every filter holds."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one filter holds."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The filter does not hold."""

    filter: Filter


Filter = Equal | Range | OneOf | AllOf | AnyOf | Not


def field_keys(field: str) -> list[str]:
    """Returns the keys that lead to a field, outermost first."""
    return field.split(".")


def is_field(field: str) -> bool:
    """Whether a filter can name it: keys joined by dots, printable and without quotes and backslashes."""
    return all(field.split(".")) and field.isprintable() and '"' not in field and "\\" not in field


def kind_of(value: object) -> str | None:
    """Returns "bool", "number" or "text", or None for what no condition compares."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None


def matches(condition: Filter, metadata: Mapping[str, Any]) -> bool:
    """Whether a document with this metadata meets the condition."""
    match condition:
        case AllOf(filters):
            return all(matches(one, metadata) for one in filters)
        case AnyOf(filters):
            return any(matches(one, metadata) for one in filters)
        case Not(negated):
            return not matches(negated, metadata)
        case Equal(field, value):
            return _same(_lookup(metadata, field), value)
        case OneOf(field, values):
            found = _lookup(metadata, field)
            return any(_same(found, value) for value in values)
        case Range(field):
            return _within(_lookup(metadata, field), condition)


def _lookup(metadata: Mapping[str, Any], field: str) -> Any:
    found: Any = metadata
    for key in field_keys(field):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def _same(found: Any, value: Value) -> bool:
    return kind_of(found) == kind_of(value) and bool(found == value)


def _within(found: Any, condition: Range) -> bool:
    for operator, bound in condition.bounds():
        if kind_of(found) != kind_of(bound):
            return False
        if operator == ">" and not found > bound:
            return False
        if operator == ">=" and not found >= bound:
            return False
        if operator == "<" and not found < bound:
            return False
        if operator == "<=" and not found <= bound:
            return False
    return True
