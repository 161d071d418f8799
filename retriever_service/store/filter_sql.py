"""A filter as a WHERE clause over SQLite's JSON."""

from collections.abc import Collection

from retriever_service.filters import (
    AllOf,
    AnyOf,
    Equal,
    Filter,
    Not,
    OneOf,
    Range,
    Value,
    field_keys,
    kind_of,
)

_JSON_TYPES = {"text": "('text')", "number": "('integer', 'real')"}
_Clause = tuple[str, list[str | int | float]]


def where_clause(condition: Filter, column: str, indexed: Collection[str] = ()) -> _Clause:
    """Returns the clause and its parameters; `column` holds a JSON object or NULL, and is no one's input.

    Conditions on `indexed` fields are written as their indexes are, so that SQLite finds these. Without any, the
    clause is never NULL, so that NOT means what it says.
    """
    match condition:
        case AllOf(filters):
            return _joined(" AND ", filters, column, indexed)
        case AnyOf(filters):
            return _joined(" OR ", filters, column, indexed)
        case Not(negated):
            clause, parameters = where_clause(negated, column)
            return f"NOT {clause}", parameters
        case Equal(field, value):
            return _compared(field, "=", [value], column, indexed)
        case OneOf(field, values):
            return _member(field, values, column, indexed)
        case Range():
            return _joined_parts(
                " AND ",
                [
                    _compared(condition.field, operator, [bound], column, indexed)
                    for operator, bound in condition.bounds()
                ],
            )


def value_of(field: str, column: str) -> str:
    """Returns the expression of a field's value: what is indexed, and what conditions on an indexed field name."""
    path = _path(field).replace("'", "''")
    return f"json_extract({column}, '{path}')"


def _joined(operator: str, filters: tuple[Filter, ...], column: str, indexed: Collection[str]) -> _Clause:
    return _joined_parts(operator, [where_clause(one, column, indexed) for one in filters])


def _joined_parts(operator: str, parts: list[_Clause]) -> _Clause:
    clause = operator.join(clause for clause, _ in parts)
    return f"({clause})", [parameter for _, parameters in parts for parameter in parameters]


def _compared(
    field: str, operator: str, values: list[Value], column: str, indexed: Collection[str]
) -> _Clause:
    """Compares with values of one kind; several of them stand behind IN."""
    path = _path(field)
    if isinstance(values[0], bool):
        wanted = "true" if values[0] else "false"
        return f"coalesce(json_type({column}, ?) = '{wanted}', 0)", [path]
    # json_type too: without it, true would equal 1 and a list its own text.
    typed = f"json_type({column}, ?) IN {_JSON_TYPES[str(kind_of(values[0]))]}"
    marks = f"({','.join('?' * len(values))})" if operator == "IN" else "?"
    if field in indexed:
        return f"({value_of(field, column)} {operator} {marks} AND {typed})", [*values, path]
    clause = f"coalesce({typed} AND json_extract({column}, ?) {operator} {marks}, 0)"
    return clause, [path, path, *values]


def _member(field: str, values: tuple[Value, ...], column: str, indexed: Collection[str]) -> _Clause:
    parts = [_compared(field, "=", [value], column, indexed) for value in values if isinstance(value, bool)]
    for kind in _JSON_TYPES:
        of_kind = [value for value in values if kind_of(value) == kind]
        if of_kind:
            parts.append(_compared(field, "IN", of_kind, column, indexed))
    return _joined_parts(" OR ", parts)


def _path(field: str) -> str:
    """Returns SQLite's path: each key in double quotes, which no key of a checked filter holds."""
    return "$" + "".join(f'."{key}"' for key in field_keys(field))
