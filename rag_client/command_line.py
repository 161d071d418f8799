"""What the parts of the `rag` command share: options, a client whose failures are one line, JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from rag_client.client import RagClient
from rag_client.errors import RagClientError, TimedOutError, UnreachableError
from rag_client.settings import ClientSettings

Generator = Annotated[
    str | None,
    typer.Option("--generator", help="Its address (env RAG_CLIENT_GENERATOR, default localhost:50052)."),
]
Retriever = Annotated[
    str | None,
    typer.Option("--retriever", help="Its address (env RAG_CLIENT_RETRIEVER, default localhost:50051)."),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout-s", help="Seconds a call may take (env RAG_CLIENT_TIMEOUT_S, default 60)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a picture.")]


@contextmanager
def connected(settings: ClientSettings) -> Iterator[RagClient]:
    """A client whose failures become one line on stderr and exit status 1."""
    try:
        with RagClient(settings.generator, settings.retriever, timeout_s=settings.timeout_s) as client:
            yield client
    except RagClientError as error:
        typer.echo(f"rag: {_explained(error, settings)}", err=True)
        raise typer.Exit(1) from error


def shown_progress(description: str, *, hidden: bool) -> Progress:
    """Returns a bar on stderr that goes away in the end; none is shown where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)


def print_json(value: Any) -> None:
    """Prints a value of the client, indented."""
    typer.echo(json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False))


def print_json_line(value: Any) -> None:
    """Prints a value of the client on one line."""
    typer.echo(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """Returns what JSON can hold; infinities become null, an error its status, reason and message."""
    if isinstance(value, RagClientError):
        return {"code": value.code.name, "reason": value.reason, "message": value.message}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _explained(error: RagClientError, settings: ClientSettings) -> str:
    side = "generator" if error.address == settings.generator else "retriever"
    if isinstance(error, UnreachableError):
        return f"no {side} at {error.address}: is the pair running? try make run"
    if isinstance(error, TimedOutError):
        return f"no answer from the {side} at {error.address} within {settings.timeout_s:g} s"
    if error.field_violations:
        return "; ".join(f"{one.field}: {one.description}" for one in error.field_violations)
    wait = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    return f"{error.code.name}: {error.message}{wait}"
