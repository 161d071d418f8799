"""How a build says how far it has come."""

import io

from rich.console import Console

from retriever_service.ingest.progress import shown_progress


def shown(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    with shown_progress(console) as progress:
        for done in (1024, 1536, 2000):
            progress("documents", done, 2000)
        progress("index", 0, 2000)
        progress("index", 2000, 2000)
        progress("publish", 0, 1)
        progress("publish", 1, 1)
    return stream.getvalue()


def test_log_gets_a_line_when_a_stage_begins_and_when_it_ends() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "reading and embedding, going on after 1,024: 1,024 of 2,000"
    assert lines[1].startswith("reading and embedding, going on after 1,024: 2,000 of 2,000, ")
    assert [line.partition(":")[0] for line in lines[2:]] == ["indexing", "indexing", "writing", "writing"]
    assert "\x1b" not in "".join(lines)


def test_terminal_gets_bars() -> None:
    told = shown(terminal=True)
    assert "2000/2000" in told
    assert "━" in told
