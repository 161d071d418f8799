"""Reads a folder of Markdown and text files: a page a file, its title from front matter, heading or name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retriever_service.errors import BuildError

MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
TEXT_SUFFIXES = frozenset({".txt", ".text"})
_FENCE = "---"
_markdown = MarkdownIt("commonmark").enable("table")


def page_files(path: Path) -> list[Path]:
    """Returns the pages in a folder and below it, by name; hidden ones are left out. A file is itself a page."""
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in MARKDOWN_SUFFIXES | TEXT_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def read_pages(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields key (the path in the folder), title and text of each page, and where it came from.

    Pages without text are left out. Raises BuildError naming a file that cannot be read.
    """
    for file in page_files(path):
        try:
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BuildError(f"{file}: cannot be read: {error}") from error
        if file.suffix.lower() in MARKDOWN_SUFFIXES:
            title, text = markdown_page(content)
        else:
            title, text = None, content.strip()
        if text:
            key = file.name if file == path else file.relative_to(path).as_posix()
            yield {"key": key, "title": title or file.stem, "text": text}, str(file)


def markdown_page(content: str) -> tuple[str | None, str]:
    """Returns title and plain text; blocks stand apart by an empty line.

    The title is the front matter's, or the first heading, which is then no part of the text.
    """
    title, body = _front_matter(content.replace("\r\n", "\n"))
    blocks: list[str] = []
    heading = False
    for token in _markdown.parse(body):
        heading = token.type == "heading_open" or (heading and token.type != "heading_close")
        text = _plain(token)
        if heading and text and title is None:
            title = text
        elif text:
            blocks.append(text)
    return title, "\n\n".join(blocks)


def _front_matter(content: str) -> tuple[str | None, str]:
    head, fence, body = content.removeprefix(f"{_FENCE}\n").partition(f"\n{_FENCE}\n")
    if not content.startswith(f"{_FENCE}\n") or not fence:
        return None, content
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError:
        return None, content
    if not isinstance(fields, dict):
        return None, content
    title = fields.get("title")
    return None if title is None else str(title), body


def _plain(token: Token) -> str:
    """Returns what a reader sees of a token; markup and HTML are not text."""
    if token.type in {"fence", "code_block"}:
        return token.content.strip("\n")
    if token.type != "inline":
        return ""
    pieces = []
    for child in token.children or ():
        if child.type in {"softbreak", "hardbreak"}:
            pieces.append(" ")
        elif child.type in {"text", "code_inline", "image"}:
            pieces.append(child.content)
    return "".join(pieces).strip()
