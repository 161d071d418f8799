"""How the `rag` command shows the corpus and the retriever's long operations on a terminal."""

import json
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rag_client import views
from rag_client.operation import Operation
from rag_client.types import CorpusDocument


def documents_table(documents: Sequence[CorpusDocument], *, header: bool) -> RenderableType:
    """Documents of the corpus: row, key, title and how the text begins."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=header)
    table.add_column("row", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("title")
    table.add_column("text")
    for one in documents:
        table.add_row(str(one.row), Text(one.key), Text(one.title), Text(views.cut(one.text), no_wrap=True))
    return table


def document_view(document: CorpusDocument) -> RenderableType:
    """A document as a whole."""
    headline = Text(document.key, style="bold")
    headline.append(f"   row {document.row}, etag {document.etag}", style="dim not bold")
    parts: list[RenderableType] = [headline]
    if document.title:
        parts.append(Padding(Text(document.title, style="green"), (0, 0, 0, 2)))
    parts.append(Padding(Text(document.text), (0, 0, 0, 2)))
    if document.metadata is not None:
        metadata = json.dumps(document.metadata, ensure_ascii=False)
        parts.append(Padding(Text(metadata, style="dim"), (0, 0, 0, 2)))
    return Group(*parts)


def operations_table(operations: Sequence[Operation]) -> RenderableType:
    """Operations: when they began, how far they are, how they ended."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("began", "operation", "state", "documents"):
        table.add_column(name, overflow="fold")
    for one in operations:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.create_time_s))
        table.add_row(began, Text(one.name), state_text(one), _documents(one))
    return table


def state_text(operation: Operation) -> Text:
    """What an operation does, or how it ended."""
    if operation.error is not None:
        return Text(f"{operation.error.code.name}: {operation.error.message}", style="red")
    if operation.done:
        return Text("done", style="green")
    return Text(operation.stage)


def _documents(operation: Operation) -> str:
    total = operation.total_documents
    return f"{operation.done_documents} of {total}" if total else str(operation.done_documents)
