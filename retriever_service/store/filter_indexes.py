"""SQLite indexes on metadata fields: filters on them read the documents that they find, and no others."""

import sqlite3
from collections.abc import Iterable

from retriever_service.store.filter_sql import value_of

_PREFIX = "filter:"


def create_filter_indexes(connection: sqlite3.Connection, schema: str, fields: Iterable[str]) -> None:
    """Indexes the fields of `schema`.documents that are not. A field is a key, or keys joined by dots, unquoted."""
    for field in fields:
        connection.execute(
            f'CREATE INDEX IF NOT EXISTS {schema}."{_PREFIX}{field}" ON documents ({value_of(field, "metadata")})'
        )


def indexed_fields(connection: sqlite3.Connection, schema: str) -> frozenset[str]:
    """Returns the fields that `create_filter_indexes` has indexed there."""
    query = f"SELECT name FROM {schema}.sqlite_master WHERE type = 'index' AND name GLOB ?"  # noqa: S608  (ours)
    return frozenset(name.removeprefix(_PREFIX) for (name,) in connection.execute(query, (f"{_PREFIX}*",)))
