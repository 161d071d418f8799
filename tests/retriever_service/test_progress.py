"""How a build says how far it has come."""

import io

import pytest
from rich.console import Console

from retriever_service.ingest import progress as progress_module
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


def test_stage_without_a_total_shows_about_how_much_there_is_and_ends_with_what_there_was() -> None:
    stream = io.StringIO()
    with shown_progress(Console(file=stream, width=120), lambda done: 3 * done or None) as progress:
        for done in (0, 512, 700):
            progress("documents", done, None)
        progress("index", 0, 700)
        progress("index", 700, 700)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading and embedding: 0"
    assert lines[1].startswith("reading and embedding: 700, ")
    assert [line.partition(",")[0] for line in lines[2:]] == ["indexing: 0 of 700", "indexing: 700 of 700"]


def test_stage_without_a_total_says_now_and_then_about_how_much_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_PER_LINE", 0.0)
    stream = io.StringIO()
    with shown_progress(Console(file=stream, width=120), lambda done: 3 * done or None) as progress:
        progress("documents", 0, None)
        progress("documents", 512, None)
    assert stream.getvalue().splitlines()[1].startswith("reading and embedding: 512 of about 1,536, ")


def test_terminal_shows_the_estimate_as_the_total() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with shown_progress(console, lambda done: 3 * done or None) as progress:
        progress("documents", 0, None)
        progress("documents", 512, None)
    assert "512/1536" in stream.getvalue()


def test_terminal_gets_bars() -> None:
    told = shown(terminal=True)
    assert "2000/2000" in told
    assert "━" in told
