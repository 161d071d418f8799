"""A filter as a WHERE clause over SQLite's JSON."""

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


def where_clause(condition: Filter, column: str) -> tuple[str, list[str | int | float]]:
    """Returns the clause and its parameters; `column` holds a JSON object or NULL, and is no one's input.

    The clause is never NULL, so that NOT means what it says.
    """
    match condition:
        case AllOf(filters):
            return _joined(" AND ", filters, column)
        case AnyOf(filters):
            return _joined(" OR ", filters, column)
        case Not(negated):
            clause, parameters = where_clause(negated, column)
            return f"NOT {clause}", parameters
        case Equal(field, value):
            return _compared(field, "=", value, column)
        case OneOf(field, values):
            return _member(field, values, column)
        case Range():
            return _joined_parts(
                " AND ",
                [
                    _compared(condition.field, operator, bound, column)
                    for operator, bound in condition.bounds()
                ],
            )


def _joined(operator: str, filters: tuple[Filter, ...], column: str) -> tuple[str, list[str | int | float]]:
    return _joined_parts(operator, [where_clause(one, column) for one in filters])


def _joined_parts(
    operator: str, parts: list[tuple[str, list[str | int | float]]]
) -> tuple[str, list[str | int | float]]:
    clause = operator.join(clause for clause, _ in parts)
    return f"({clause})", [parameter for _, parameters in parts for parameter in parameters]


def _compared(field: str, operator: str, value: Value, column: str) -> tuple[str, list[str | int | float]]:
    path = _path(field)
    if isinstance(value, bool):
        wanted = "true" if value else "false"
        return f"coalesce(json_type({column}, ?) = '{wanted}', 0)", [path]
    types = _JSON_TYPES[str(kind_of(value))]
    # json_type first: without it, true would equal 1 and a list its own text.
    clause = f"coalesce(json_type({column}, ?) IN {types} AND json_extract({column}, ?) {operator} ?, 0)"
    return clause, [path, path, value]


def _member(field: str, values: tuple[Value, ...], column: str) -> tuple[str, list[str | int | float]]:
    path = _path(field)
    parts = [_compared(field, "=", value, column) for value in values if isinstance(value, bool)]
    for kind, types in _JSON_TYPES.items():
        of_kind = [value for value in values if kind_of(value) == kind]
        if of_kind:
            marks = ",".join("?" * len(of_kind))
            clause = (
                f"coalesce(json_type({column}, ?) IN {types} AND json_extract({column}, ?) IN ({marks}), 0)"
            )
            parts.append((clause, [path, path, *of_kind]))
    return _joined_parts(" OR ", parts)


def _path(field: str) -> str:
    """Returns SQLite's path: each key in double quotes, which no key of a checked filter holds."""
    return "$" + "".join(f'."{key}"' for key in field_keys(field))
