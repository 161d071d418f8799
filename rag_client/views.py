"""How the `rag` command shows answers, documents and the pair's state on a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rag_client import bars, provenance_views
from rag_client.types import (
    Answer,
    AnswerSpan,
    Document,
    Generation,
    Health,
    Hypothesis,
    IndexInfo,
    ModelInfo,
    RetrievedDocument,
)

_EXCERPT_CHARS = 60


def answer_view(generation: Generation, answer: Answer) -> RenderableType:
    """The answer with its log-probability, where it stands, the documents behind it and the runners-up."""
    parts: list[RenderableType] = []
    if answer.abstained:
        unsure = Text("no answer", style="bold yellow")
        unsure.append(f"   the best one has only p = {answer.confidence:.1%}", style="default not bold")
        parts.append(unsure)
    elif not answer.hypotheses:
        parts.append(Text("no answer", style="bold yellow"))
    else:
        best = answer.best
        headline = Text(best.answer or "(empty answer)", style="bold green")
        headline.append(
            f"   p = {best.probability:.1%}, log p = {best.log_likelihood:.3f}", style="default not bold"
        )
        parts.append(headline)
        if best.provenance is not None:
            parts.append(Padding(provenance_views.coloured_tokens(best.provenance), (0, 0, 0, 2)))
        if best.span is not None and best.span.document < len(answer.documents):
            parts.append(Padding(_quote(best.span, answer.documents[best.span.document]), (0, 0, 0, 2)))
    if answer.documents:
        posterior = answer.best.document_posterior if answer.hypotheses else []
        parts += [Text(), documents_table(answer.documents, posterior)]
    if len(answer.hypotheses) > 1:
        parts += [Text(), _runners_up(answer.hypotheses[1:])]
    parts += [Text(), Text(_how(generation, answer), style="dim")]
    return Group(*parts)


def documents_table(documents: Sequence[RetrievedDocument], posterior: Sequence[float]) -> RenderableType:
    """The documents behind an answer: doc_score, prior and posterior share."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("document")
    table.add_column("doc_score", justify="right")
    table.add_column("prior", no_wrap=True)
    table.add_column("posterior", no_wrap=True)
    for place, document in enumerate(documents):
        share = posterior[place] if place < len(posterior) else None
        table.add_row(
            Text(document.title or document.key, style=provenance_views.colour(place)),
            f"{document.doc_score:.3f}",
            bars.share_bar(document.prior),
            bars.share_bar(share) if share is not None else "",
        )
    return Padding(table, (0, 0, 0, 2))


def retrieval_table(documents: Sequence[Document], doc_scores: Sequence[float]) -> RenderableType:
    """Documents found for a question: doc_score, row, title and how the text begins."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("doc_score", justify="right")
    table.add_column("row", justify="right")
    table.add_column("title")
    table.add_column("text")
    for document, doc_score in zip(documents, doc_scores, strict=False):
        table.add_row(
            f"{doc_score:.3f}",
            str(document.row),
            Text(document.title),
            Text(cut(document.text), no_wrap=True),
        )
    return table


def status_view(
    health: Mapping[str, Health],
    addresses: Mapping[str, str],
    model: ModelInfo | None,
    index: IndexInfo | None,
) -> RenderableType:
    """Health of both services, the model and the index."""
    table = Table.grid(padding=(0, 2))
    for service, state in health.items():
        style = "green" if state is Health.SERVING else "red"
        table.add_row(Text(service), Text(addresses[service], style="dim"), Text(state.value, style=style))
    parts: list[RenderableType] = [table]
    for title, described in (("model", model), ("index", index)):
        if described is None:
            continue
        parts += [Text(), Text(title, style="bold"), Padding(facts_table(described), (0, 0, 0, 2))]
    return Group(*parts)


def facts_table(described: ModelInfo | IndexInfo) -> Table:
    """A model or an index, a line a fact."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")  # a digest or a folder is of use as a whole
    for name in described.__dataclass_fields__:
        facts.add_row(Text(name, style="dim"), Text(_fact(getattr(described, name))))
    return facts


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return text if text and text == text.strip() else repr(text)


def _quote(span: AnswerSpan, document: RetrievedDocument) -> Text:
    whole = document.title if span.in_title else document.text
    room = max(_EXCERPT_CHARS - (span.end - span.start), 0) // 2
    start, end = max(span.start - room, 0), min(span.end + room, len(whole))
    if start > 0:  # at the beginning of a word
        start = min(whole.find(" ", start, span.start) + 1 or start, span.start)
    if end < len(whole):  # at the end of one
        end = max(whole.rfind(" ", span.end, end), span.end)
    quote = Text(style="italic")
    quote.append("…" if start > 0 else "")
    quote.append(whole[start : span.start])
    quote.append(whole[span.start : span.end], style="bold")
    quote.append(whole[span.end : end])
    quote.append("…" if end < len(whole) else "")
    quote.append(f"  ({document.title or document.key})", style="not italic dim")
    return quote


def _runners_up(hypotheses: Sequence[Hypothesis]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("other answers")
    table.add_column("p", justify="right")
    table.add_column("log p", justify="right")
    for one in hypotheses:
        text = Text(one.answer or "(empty answer)")
        table.add_row(text, f"{one.probability:.1%}", f"{one.log_likelihood:.3f}")
    return Padding(table, (0, 0, 0, 2))


def _how(generation: Generation, answer: Answer) -> str:
    strategy = generation.strategy.value
    if generation.strategy_differs_from_checkpoint:
        strategy += " (not the checkpoint's own)"
    timings = generation.timings
    return (
        f"{strategy}, {answer.n_docs} documents, {timings.total_s * 1000:.0f} ms "
        f"(encode {timings.encode_s * 1000:.0f}, retrieve {timings.retrieve_s * 1000:.0f}, "
        f"queue {timings.queue_s * 1000:.0f}, generate {timings.generate_s * 1000:.0f})"
    )


def cut(text: str) -> str:
    """The beginning of a text, for a line of a table."""
    return text if len(text) <= _EXCERPT_CHARS else f"{text[: _EXCERPT_CHARS - 1]}…"
