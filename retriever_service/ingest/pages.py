"""Reads a folder of Markdown and text files: a page a file, its title from front matter, heading or name."""

import html
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retriever_service.errors import BuildError

MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
TEXT_SUFFIXES = frozenset({".txt", ".text"})
_FENCE = "---"
_NULL = "tag:yaml.org,2002:null"
_markdown = MarkdownIt("commonmark").enable("table")
# Tags within a word or a sentence; all others stand between words.
_INLINE_TAG = re.compile(
    r"</?(?:a|abbr|b|code|em|i|kbd|mark|s|small|span|strong|sub|sup|u)\b[^<>]*>", re.IGNORECASE
)
_UNSEEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|<[/!?a-z][^>]*(?:>|\Z)", re.IGNORECASE | re.DOTALL
)


def page_files(path: Path) -> list[Path]:
    """Returns the pages in a folder and below it, by name; hidden ones are left out. A file is itself a page.

    Raises BuildError naming a folder that cannot be read.
    """
    if path.is_file():
        return [path]
    found: list[Path] = []
    try:
        for folder, inner, names in os.walk(path, onerror=_raise):
            inner[:] = [name for name in inner if not name.startswith(".")]
            files = (Path(folder, name) for name in names if not name.startswith("."))
            found += [file for file in files if _is_page(file) and file.is_file()]
    except OSError as error:
        raise BuildError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return sorted(found)


def read_pages(path: Path, files: Iterable[Path]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields key (the path in the folder `path`), title and text of each page, and where it came from.

    Pages without text are left out. Raises BuildError naming a file that cannot be read.
    """
    for file in files:
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


def _is_page(file: Path) -> bool:
    return file.suffix.lower() in MARKDOWN_SUFFIXES | TEXT_SUFFIXES


def _raise(error: OSError) -> None:
    raise error


def _front_matter(content: str) -> tuple[str | None, str]:
    head, fence, body = content.removeprefix(f"{_FENCE}\n").partition(f"\n{_FENCE}\n")
    if not content.startswith(f"{_FENCE}\n") or not fence:
        return None, content
    try:
        # Composed, not constructed: of values that are none, such as dates that no calendar has, nothing is asked.
        fields = yaml.compose(head, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return None, content
    if not isinstance(fields, yaml.MappingNode):
        return None, content
    title = next((value for name, value in reversed(fields.value) if name.value == "title"), None)
    if not isinstance(title, yaml.ScalarNode) or title.tag == _NULL:
        return None, body
    return title.value, body


def _plain(token: Token) -> str:
    """Returns what a reader sees of a token; markup and HTML's tags are not text."""
    if token.type in {"fence", "code_block"}:
        return token.content.strip("\n")
    if token.type == "html_block":
        return " ".join(html.unescape(_UNSEEN.sub(" ", _INLINE_TAG.sub("", token.content))).split())
    if token.type != "inline":
        return ""
    pieces = []
    for child in token.children or ():
        if child.type in {"softbreak", "hardbreak"}:
            pieces.append(" ")
        elif child.type in {"text", "code_inline", "image"}:
            pieces.append(child.content)
    return "".join(pieces).strip()
