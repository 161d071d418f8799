"""`rag index`: show, compact and switch the index that serves."""

import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from rag_client import corpus_views, views
from rag_client.client import RagClient
from rag_client.command_line import Json, Retriever, Timeout, connected, print_json, shown_progress
from rag_client.operation import Operation
from rag_client.settings import ClientSettings, client_settings

_POLL_S = 0.2

app = typer.Typer(help="Show, compact and switch the index that serves.", no_args_is_help=True)

NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Begin it only; `rag index operations` says how far it is.")
]


@app.command()
def show(retriever: Retriever = None, as_json: Json = False, timeout_s: Timeout = None) -> None:
    """Show the index that serves, and how many changes wait for a compaction."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    with connected(settings) as client:
        index = client.get_index()
    if as_json:
        print_json(index)
    else:
        Console().print(views.facts_table(index))


@app.command()
def compact(
    no_wait: NoWait = False, retriever: Retriever = None, as_json: Json = False, timeout_s: Timeout = None
) -> None:
    """Write the changes into a new snapshot and wait until it serves; Ctrl-C cancels it."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    _operate(settings, lambda client: client.begin_compaction(), no_wait=no_wait, as_json=as_json)


@app.command()
def activate(
    folder: Annotated[str, typer.Argument(help="An index folder below the retriever's activation_root.")],
    ignore_callers: Annotated[
        bool, typer.Option("--ignore-callers", help="Also one that does not fit those who asked of late.")
    ] = False,
    no_wait: NoWait = False,
    retriever: Retriever = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """Let another index folder serve and wait until it does; Ctrl-C cancels it. Going back is the same command."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)

    def begin(client: RagClient) -> Operation:
        return client.begin_activation(folder, ignore_callers=ignore_callers)

    _operate(settings, begin, no_wait=no_wait, as_json=as_json)


@app.command()
def operations(
    cancel: Annotated[
        str | None, typer.Option("--cancel", metavar="NAME", help="Ask this one to stop first.")
    ] = None,
    retriever: Retriever = None,
    as_json: Json = False,
    timeout_s: Timeout = None,
) -> None:
    """List compactions and activations of the retriever's process, newest first."""
    settings = client_settings(retriever=retriever, timeout_s=timeout_s)
    with connected(settings) as client:
        if cancel is not None:
            client.cancel_operation(cancel)
        listed = client.list_operations()
    if as_json:
        print_json(listed)
    elif listed:
        Console().print(corpus_views.operations_table(listed))
    else:
        Console().print("no operations")


def _operate(
    settings: ClientSettings,
    begin: Callable[[RagClient], Operation],
    *,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Begins an operation and, unless told not to, follows it to its end and shows the index that serves then."""
    with connected(settings) as client:
        operation = begin(client)
        if no_wait:
            if as_json:
                print_json(operation)
            else:
                typer.echo(operation.name)
            return
        index = _followed(client, operation, as_json=as_json).outcome()
    if as_json:
        print_json(index)
    else:
        typer.echo(f"generation {index.generation} serves {index.ntotal} documents from {index.index_folder}")


def _followed(client: RagClient, operation: Operation, *, as_json: bool) -> Operation:
    """Waits for the end. The first Ctrl-C asks the operation to stop, a second one leaves it to itself."""
    with shown_progress("{task.description}", hidden=as_json) as progress:
        task = progress.add_task(operation.stage, total=None)
        try:
            return _watched(client, operation, progress, task)
        except KeyboardInterrupt:
            typer.echo(f"rag: asking {operation.name} to stop", err=True)
            return _watched(client, client.cancel_operation(operation.name), progress, task)


def _watched(client: RagClient, operation: Operation, progress: Progress, task: TaskID) -> Operation:
    while not operation.done:
        progress.update(
            task,
            description=operation.stage,
            completed=operation.done_documents,
            total=operation.total_documents or None,
        )
        time.sleep(_POLL_S)
        operation = client.get_operation(operation.name)
    return operation
