"""A filter as a WHERE clause over SQLite's JSON."""

from collections.abc import Collection, Sequence

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
# SQLite may end a text of JSON at its first NUL. Where a document holds one, NUL and U+0001 are compared as two
# characters each, which keeps the order of texts. Backslashes go first: an escaped one may stand before u0000.
_NUL = r"\u0000"
_SPELLINGS = ((r"\\", r"\u005c"), (r"\u0001", r"\u0001\u0002"), (_NUL, r"\u0001\u0001"))
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
    texts = [value for value in values if isinstance(value, str)]
    # To a text without NUL, what SQLite cuts at one compares as the whole does, but for being equal.
    if texts and (operator not in {"<", ">="} or "\0" in texts[0]):
        return _compared_whole(field, operator, texts, column, indexed)
    # json_type too: without it, true would equal 1 and a list its own text.
    typed = f"json_type({column}, ?) IN {_JSON_TYPES[str(kind_of(values[0]))]}"
    marks = _marks(operator, values)
    if field in indexed:
        return f"({value_of(field, column)} {operator} {marks} AND {typed})", [*values, path]
    clause = f"coalesce({typed} AND json_extract({column}, ?) {operator} {marks}, 0)"
    return clause, [path, path, *values]


def _compared_whole(
    field: str, operator: str, texts: list[str], column: str, indexed: Collection[str]
) -> _Clause:
    """Takes what may meet the condition, whether SQLite cuts texts at NUL or not, and of that what does."""
    path = _path(field)
    found, path_of_found = f"json_extract({column}, ?)", [path]
    if field in indexed:
        found, path_of_found = value_of(field, column), []
    cut = [text.partition("\0")[0] for text in texts]
    loosely, near = operator, texts
    if operator in {"<", "<="}:
        loosely = "<="
    elif operator in {">", ">="}:
        loosely, near = ">=", cut
    elif cut != texts:
        loosely, near = "IN", [*texts, *cut]
    cut_meets, values = f"{found} {operator} {_marks(operator, texts)}", [*path_of_found, *texts]
    if loosely == operator and cut == texts:
        cut_meets, values = "1", []
    whole = column
    for written, instead in _SPELLINGS:
        whole = f"replace({whole}, '{written}', '{instead}')"
    clause = (
        f"{found} {loosely} {_marks(loosely, near)} AND json_type({column}, ?) IN {_JSON_TYPES['text']}"
        f" AND CASE WHEN instr({column}, '{_NUL}')"
        f" THEN json_extract({whole}, ?) {operator} {_marks(operator, texts)} ELSE {cut_meets} END"
    )
    clause = f"({clause})" if field in indexed else f"CASE WHEN {clause} THEN 1 ELSE 0 END"
    return clause, [*path_of_found, *near, path, path, *map(_spelled, texts), *values]


def _marks(operator: str, values: Sequence[Value]) -> str:
    return f"({','.join('?' * len(values))})" if operator == "IN" else "?"


def _spelled(text: str) -> str:
    return text.replace("\1", "\1\2").replace("\0", "\1\1")


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
