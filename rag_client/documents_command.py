"""`rag documents`: write, delete, list and read documents of a corpus that serves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rag_client import corpus_views
from rag_client.client import RagClient
from rag_client.command_line import (
    Json,
    Retriever,
    Timeout,
    connected,
    print_json,
    print_json_line,
    shown_progress,
)
from rag_client.corpus import Upserted, new_request_id
from rag_client.document_file import STDIN, DocumentBatch, DocumentFileError, opened, read_batches
from rag_client.errors import InvalidRequestError
from rag_client.settings import client_settings

_PAGE = 100
_KEYS_A_CALL = 256

app = typer.Typer(help="Write, delete, list and read documents of the corpus.", no_args_is_help=True)

RequestId = Annotated[
    str | None,
    typer.Option("--request-id", help="Of an earlier run that broke off: what it did is not done again."),
]
Keys = Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Keys of documents.")]


@app.command()
def upsert(
    file: Annotated[
        str,
        typer.Argument(help='JSONL: {"key": …, "text": …, "title", "metadata", "embedding"}; - is stdin.'),
    ],
    create_only: Annotated[
        bool, typer.Option("--create-only", help="Refuse a batch that has a key which is already there.")
    ] = False,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Documents of a batch: all of them are written, or none."),
    ] = 256,
    request_id: RequestId = None,
    retriever: Retriever = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Add and overwrite documents, batch by batch; --timeout-s is for each batch.

    Without "embedding" in its lines the retriever must have been started with --embedding-model.
    """
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    request_id = new_request_id(request_id)
    written = {"created": 0, "replaced": 0, "sequence": 0}
    with (
        _broken_off(request_id, written),
        shown_progress("{task.description} {task.fields[documents]}", hidden=as_json) as progress,
        connected(settings) as client,
        opened(file) as stream,
    ):
        known = file != STDIN and not file.endswith(".gz")
        task = progress.add_task("writing", total=Path(file).stat().st_size if known else None, documents=0)
        for number, batch in enumerate(read_batches(stream, file, batch_size)):
            done = _upserted(client, batch, f"{request_id}-{number}", create_only=create_only)
            written["created"] += done.created
            written["replaced"] += done.replaced
            written["sequence"] = done.sequence
            documents = written["created"] + written["replaced"]
            progress.update(task, advance=batch.size_bytes, documents=documents)
    if as_json:
        print_json({"request_id": request_id, **written})
    else:
        typer.echo(f"created {written['created']}, replaced {written['replaced']}")


@app.command()
def delete(
    keys: Keys = None,
    file: Annotated[
        str | None, typer.Option("--file", help="A file with a key on each line; - is stdin.")
    ] = None,
    request_id: RequestId = None,
    retriever: Retriever = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Delete documents by key; keys that are not there are told and are no error."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    request_id = new_request_id(request_id)
    missing: list[str] = []
    done = {"deleted": 0, "sequence": 0}
    with _broken_off(request_id, done), connected(settings) as client:
        wanted = list(dict.fromkeys([*(keys or []), *(_keys_of(file) if file is not None else [])]))
        if not wanted:
            raise DocumentFileError("name keys to delete, as arguments or with --file")
        for number, start in enumerate(range(0, len(wanted), _KEYS_A_CALL)):
            some = wanted[start : start + _KEYS_A_CALL]
            deleted = client.delete_documents(some, request_id=f"{request_id}-{number}")
            missing += deleted.missing_keys
            done["deleted"] += deleted.deleted
            done["sequence"] = deleted.sequence
    if as_json:
        print_json({"request_id": request_id, **done, "missing_keys": missing})
    else:
        typer.echo(f"deleted {done['deleted']}")
        _say_missing(missing)


@app.command(name="list")
def list_documents(
    limit: Annotated[int, typer.Option("--limit", min=0, help="Documents at most; 0 is all.")] = 100,
    page_token: Annotated[
        str, typer.Option("--page-token", help="Go on where an earlier listing says it ended.")
    ] = "",
    retriever: Retriever = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line a document, as `rag documents upsert` reads them.")
    ] = False,
    timeout_s: Timeout = None,
) -> None:
    """List documents in the order of their keys."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    shown = 0
    with connected(settings) as client:
        while True:
            page_size = min(_PAGE, limit - shown) if limit else _PAGE
            page = client.document_page(page_token, page_size=page_size)
            if as_json:
                for document in page.documents:
                    print_json_line(document)
            else:
                Console().print(corpus_views.documents_table(page.documents, header=not shown))
            shown += len(page.documents)
            page_token = page.next_page_token
            if not page_token or shown == limit:
                break
    if page_token:
        typer.echo(f"{shown} of {page.total_size}; go on with --page-token {page_token}", err=True)


@app.command()
def get(
    keys: Keys = None,
    rows: Annotated[list[int] | None, typer.Option("--row", help="A row instead of a key.")] = None,
    retriever: Retriever = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Read documents by key or row; exit status 1 where one is not there."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    with connected(settings) as client:
        found = client.get_documents(keys=keys or [], rows=rows or [])
    if as_json:
        print_json(found)
    else:
        for document in found.documents:
            Console().print(corpus_views.document_view(document))
        _say_missing([*found.missing_keys, *(f"row {row}" for row in found.missing_rows)])
    if found.missing_keys or found.missing_rows:
        raise typer.Exit(1)


def _upserted(client: RagClient, batch: DocumentBatch, request_id: str, *, create_only: bool) -> Upserted:
    """Writes a batch; what is refused of it is named by file and line."""
    try:
        return client.upsert_documents(
            batch.documents,
            batch.embeddings,
            request_id=request_id,
            create_only=create_only,
            batch_size=len(batch.documents),
        )
    except InvalidRequestError as error:
        error.field_violations = tuple(map(batch.placed, error.field_violations))
        raise


@contextmanager
def _broken_off(request_id: str, done: dict[str, int]) -> Iterator[None]:
    """Says of a change that ends before its time what it did, and how to go on; bad input is exit status 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"rag: {error}", err=True)
        if done["sequence"]:
            _say_how_to_go_on(request_id, done)
        raise typer.Exit(2) from error
    except (typer.Exit, KeyboardInterrupt):
        _say_how_to_go_on(request_id, done)
        raise


def _say_how_to_go_on(request_id: str, done: dict[str, int]) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in done.items() if name != "sequence")
    typer.echo(f"rag: {counts} so far; run again with --request-id {request_id} to go on", err=True)


def _keys_of(file: str) -> list[str]:
    with opened(file) as stream:
        try:
            lines = stream.read().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise DocumentFileError(f"cannot read {file}: {error}") from error
    return [line for line in lines if line]


def _say_missing(names: Sequence[str]) -> None:
    if names:
        typer.echo(f"not there: {', '.join(names)}", err=True)
