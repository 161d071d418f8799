"""Metadata and filters as Milvus compares them: strings alone, so that every comparison means what `matches` means.

Milvus compares JSON by rules of its own: 1 and true, whole numbers past 2^53, lists, fields that are missing. So each
scalar is kept a second time, as a string that begins with its kind and is ordered as the scalars are, below the path
that leads to it; a filter becomes comparisons of such strings, each of which asks first whether the field exists.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from retriever_service.filters import AllOf, AnyOf, Equal, Filter, Not, OneOf, Range, Value, kind_of

# More than a filter's longest text: what is cut off decides no comparison.
_MAX_TEXT_BYTES = 8192
_PLAIN_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def terms_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the term of every scalar, below its path."""
    return {_path(path): term(value) for path, value in _scalars(metadata, ())}


def term(value: Value) -> str:
    """Returns a string that begins with the value's kind; strings of one kind have the values' order."""
    if isinstance(value, bool):
        return "b1" if value else "b0"
    if isinstance(value, str):
        return f"t{value.encode(errors='surrogatepass')[:_MAX_TEXT_BYTES].hex()}"
    return f"n{_number(value)}"


def expression(condition: Filter) -> str:
    """Returns the boolean expression of a filter. What it holds of the filter's is hexadecimal or plain words."""
    return _positive(condition)


def _positive(condition: Filter) -> str:
    match condition:
        case Not(negated):
            return _negative(negated)
        case AllOf(filters):
            return _joined("and", filters, _positive)
        case AnyOf(filters):
            return _joined("or", filters, _positive)
        case Equal(field, value):
            return _compared(field, [("==", term(value))])
        case OneOf(field, values):
            return balanced("or", [_compared(field, [("==", term(value))]) for value in values])
        case Range(field):
            return _compared(field, _bounds(condition))


def _negative(condition: Filter) -> str:
    """The negation, with `not` pushed to the fields: of a field that is missing, some Milvus say null to `not`."""
    match condition:
        case Not(negated):
            return _positive(negated)
        case AllOf(filters):
            return _joined("or", filters, _negative)
        case AnyOf(filters):
            return _joined("and", filters, _negative)
        case Equal(field, value):
            return _missing_or(field, [("!=", term(value))])
        case OneOf(field, values):
            return balanced("and", [_missing_or(field, [("!=", term(value))]) for value in values])
        case Range(field):
            opposite = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}
            return _missing_or(field, [(opposite[sign], bound) for sign, bound in _bounds(condition)])


def _bounds(condition: Range) -> list[tuple[str, str]]:
    """Returns the bounds given and, either side, the end of their kind."""
    kind = kind_of(condition.bounds()[0][1])
    first, behind = ("n", "o") if kind == "number" else ("t", "u")
    given = [(sign, term(value)) for sign, value in condition.bounds()]
    return [(">=", first), ("<", behind), *given]


# `exists` stands in parentheses: Milvus' grammar lets it reach as far as it can.
def _compared(field: str, comparisons: list[tuple[str, str]]) -> str:
    path = quoted_path(field)
    parts = [f'{path} {sign} "{value}"' for sign, value in comparisons]
    return f"({' and '.join([f'(exists {path})', *parts])})"


def _missing_or(field: str, comparisons: list[tuple[str, str]]) -> str:
    path = quoted_path(field)
    parts = [f'{path} {sign} "{value}"' for sign, value in comparisons]
    return f"({' or '.join([f'not (exists {path})', *parts])})"


def _joined(word: str, filters: tuple[Filter, ...], of: Callable[[Filter], str]) -> str:
    return balanced(word, [of(one) for one in filters])


def balanced(word: str, parts: list[str]) -> str:
    """Joins expressions in a tree, for parsers that descend once for each operand of a chain."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return f"({balanced(word, parts[:middle])} {word} {balanced(word, parts[middle:])})"


def quoted_path(field: str) -> str:
    """Returns where a field's terms are, as expressions and indexes name it."""
    return f'terms["{_path(field)}"]'


def _path(field: str) -> str:
    return field if _PLAIN_PATH.fullmatch(field) else f"~{field.encode(errors='surrogatepass').hex()}"


def _scalars(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Value]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if "." not in key:  # no filter's path leads there
                yield from _scalars(inner, (*keys, key))
    elif keys and kind_of(value) is not None:
        yield ".".join(keys), value


def _number(value: float) -> str:
    """Returns hexadecimal digits in the order of numbers: the double at or below, and how far a whole one is off."""
    near = float(value)
    rest = 0
    if isinstance(value, int):
        if int(near) > value:
            near = math.nextafter(near, -math.inf)
        rest = value - int(near)
    bits = struct.unpack(">Q", struct.pack(">d", near + 0.0))[0]  # -0.0 + 0.0 is 0.0
    ordered = bits ^ (2**64 - 1) if bits >> 63 else bits | 1 << 63
    return f"{ordered:016x}{min(rest, 16**8 - 1):08x}"


def fields_of(metadata: str | None) -> dict[str, Any]:
    """Returns a document's metadata as the fields of an entity: JSON as it came, empty for None, and its terms."""
    return {"metadata": metadata or "", "terms": terms_of(json.loads(metadata) if metadata else {})}
