"""Whether a tokenizer gives a text the same tokens as its two parts, split before a space.

Most tokenizers cut a text at its spaces first and then look at each piece alone. What is told here holds for a
split between a printable ASCII character and a space, and is proven by the tokenizer's parts, not tried: every
part must be one that is known to work on each side of such a border alone.

- Added tokens, found in the text before anything else: none may hold white space, else one could lie across the
  border, and none that takes the spaces to its right along may end before the border.
- Normalizers that look at a character, at a grapheme or at a letter with the marks behind it: an ASCII character
  before a space, and a space before an ASCII character, are all three. BertNormalizer, Unicode's four forms,
  Lowercase, StripAccents, SentencePiece's Precompiled; a Strip on the right; Replace of runs of spaces.
- Pre-tokenizers that never let a piece go on over a space: byte-level BPE's expression (a space begins a piece),
  Metaspace with its split, BertPreTokenizer, Whitespace, WhitespaceSplit.
- Models that see one piece at a time and draw nothing by chance: BPE without dropout, Unigram, WordPiece.
"""

import enum
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Precompiled"}
_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_MODELS = {"BPE", "Unigram", "WordPiece"}


class Splitting(enum.Enum):
    """Where a text may be split between a printable ASCII character and a space."""

    NEVER = "never"
    BEFORE_ASCII = "before_ascii"
    """Where a printable ASCII character follows the space."""
    ALWAYS = "always"


def splitting_of(backend: Tokenizer, end: str) -> Splitting:
    """Tells for texts whose first part ends in the character `end`."""
    return _splitting_of(backend, json.loads(backend.to_str()), end)


def splittings_of(backend: Tokenizer) -> dict[str, Splitting]:
    """Tells for each printable ASCII character that a first part may end in."""
    parts: dict[str, Any] = json.loads(backend.to_str())
    return {end: _splitting_of(backend, parts, end) for end in map(chr, range(ord("!"), ord("~") + 1))}


def _splitting_of(backend: Tokenizer, parts: dict[str, Any], end: str) -> Splitting:
    pre_tokenizers = list(_members(parts["pre_tokenizer"], "pretokenizers"))
    normalizers = list(_members(parts["normalizer"], "normalizers"))
    proven = (
        _is_printable(end)
        and parts["model"]["type"] in _MODELS
        and not parts["model"].get("dropout")
        and bool(pre_tokenizers)
        and all(_splits_at_spaces(one) for one in pre_tokenizers)
        and all(_works_piecewise(one) for one in normalizers)
        and not any(_may_cross(one, end) for one in parts["added_tokens"])
    )
    if not proven:
        return Splitting.NEVER
    if not normalizers:
        return Splitting.ALWAYS
    # A normalizer that is told by a table could do away with spaces.
    keeps = backend.normalizer.normalize_str(f"{end} a") == f"{end} a"
    return Splitting.BEFORE_ASCII if keeps else Splitting.NEVER


def splits_before(splitting: Splitting, right: str) -> bool:
    """Whether this may be a second part."""
    if splitting is Splitting.BEFORE_ASCII:
        return len(right) > 1 and right[0] == " " and _is_printable(right[1])
    return splitting is Splitting.ALWAYS and right[:1] == " "


def _is_printable(character: str) -> bool:
    return "!" <= character <= "~"


def _members(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for member in part[name]:
        yield from _members(member, name)


def _splits_at_spaces(pre_tokenizer: dict[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel":
        return bool(pre_tokenizer["use_regex"])
    if kind == "Metaspace":
        return bool(pre_tokenizer.get("split", True))
    return kind in _PRE_TOKENIZERS


def _works_piecewise(normalizer: dict[str, Any]) -> bool:
    kind = normalizer["type"]
    if kind == "Strip":
        return not normalizer["strip_left"]
    if kind == "Replace":
        return bool(normalizer["pattern"] == {"Regex": " {2,}"} and normalizer["content"] in {" ", "▁"})
    return kind in _NORMALIZERS


def _may_cross(token: dict[str, Any], end: str) -> bool:
    content = str(token["content"])
    if any(character.isspace() for character in content) or (token["normalized"] and not content.isascii()):
        return True
    return bool(token["rstrip"]) and content.endswith(end)
