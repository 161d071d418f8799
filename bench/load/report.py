"""Rows of a benchmark: a table for people, lines of JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """Prints rows of equal keys as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def write(rows: Sequence[Row], file: Path | None) -> None:
    """Writes one JSON object a line, where a file is asked for; nan, which JSON lacks, is null."""
    if file is not None:
        file.write_text("".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows), "utf-8")


def _plain(row: Row) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, dict):
        return " ".join(f"{name}:{count}" for name, count in value.items()) or "none"
    return str(value)
