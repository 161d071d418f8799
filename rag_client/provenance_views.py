"""How the `rag` command shows what an answer rests on: words in their documents' colours, and what each gives."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rag_client.bars import share_bar
from rag_client.types import Explanation, Provenance

_COLOURS = ("cyan", "magenta", "yellow", "blue", "green", "red")
_SURE = 0.5


def colour(document: int) -> str:
    """The style of a document, by its place; the first have one each."""
    return _COLOURS[document % len(_COLOURS)]


def coloured_tokens(provenance: Provenance) -> Text:
    """The answer's tokens in the colour of their likeliest document, dim where it has less than half."""
    line = Text()
    for source in provenance.tokens:
        sure = "" if source.probability >= _SURE else " dim"
        line.append(source.text, style=f"{colour(source.document)}{sure}")
    return line


def explanation_view(explanation: Explanation) -> RenderableType:
    """The answer, then what it loses, and what would be answered, without each document."""
    answer = explanation.answer
    headline = Text(answer.answer or "(empty answer)", style="bold green")
    headline.append(
        f"   p = {answer.probability:.1%}, log p = {answer.log_likelihood:.3f}", style="default not bold"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("without")
    table.add_column("posterior", no_wrap=True)
    table.add_column("log p", justify="right")
    table.add_column("change", justify="right")
    table.add_column("then the answer is")
    for left in explanation.left_out:
        named = left.document < len(explanation.documents)
        document = explanation.documents[left.document] if named else None
        name = str(left.document) if document is None else document.title or document.key
        then = Text("" if left.answer is None else left.answer.answer or "(empty answer)")
        then.stylize("bold" if left.answer_differs else "dim")
        table.add_row(
            Text(name, style=colour(left.document)),
            share_bar(answer.document_posterior[left.document]),
            "" if left.log_likelihood is None else f"{left.log_likelihood:.3f}",
            "" if left.change is None else f"{left.change:+.3f}",
            then,
        )
    parts: list[RenderableType] = [headline]
    if answer.provenance is not None:
        parts.append(coloured_tokens(answer.provenance))
    return Group(*parts, Text(), table)
