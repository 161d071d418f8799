"""Leaves out of a long text what no context can keep, where its other tokens provably stay as they are."""

import functools
import re

from retriever_service.context.splitting import Splitting
from retriever_service.context.tokenizer import ContextTokenizer

_CHARACTERS_A_TOKEN = 8
"""Twice as many as English has: what is tried first is nearly always enough."""


class LongTexts:
    """Shortens texts of which a context takes the first tokens and those of the tail, and nothing between."""

    def __init__(self, tokenizer: ContextTokenizer) -> None:
        self._tokenizer = tokenizer

    def longest(self, num_tokens: int) -> int:
        """Returns how many characters before its tail a text may have that is left whole in any case."""
        return 2 * _CHARACTERS_A_TOKEN * (num_tokens + 1)

    def shortened(self, text: str, tail_start: int, num_tokens: int) -> tuple[str, int]:
        """Returns the text without its middle, and where its tail begins then; the whole where that is not proven.

        Its first `num_tokens` tokens and those that reach into the tail are the whole text's, and it has more than
        `num_tokens`. For a text is head + middle + tail, each with the tokens that it has alone, as have head +
        tail: what follows the head begins with a space before which the tokenizer splits (see splitting). That the
        head has enough tokens is not guessed but counted.
        """
        if tail_start <= self.longest(num_tokens) or self._borders is None:
            return text, tail_start
        borders = self._borders
        tail = borders.last(text, tail_start)
        head_size = _CHARACTERS_A_TOKEN * (num_tokens + 1)
        while 2 * head_size < tail:
            head = borders.first(text, head_size)
            if head >= tail:
                break
            if len(self._tokenizer.encode_ids([text[:head]])[0]) > num_tokens:
                return text[:head] + text[tail:], tail_start - (tail - head)
            head_size = 2 * head
        return text, tail_start

    @functools.cached_property
    def _borders(self) -> "_Borders | None":
        splittings = self._tokenizer.splittings
        ends = [end for end, splitting in splittings.items() if splitting is not Splitting.NEVER]
        return _Borders(ends, Splitting.BEFORE_ASCII in splittings.values()) if ends else None


class _Borders:
    """Finds the spaces before which a text may be split."""

    def __init__(self, ends: list[str], before_ascii: bool) -> None:
        border = f"[{re.escape(''.join(ends))}] "
        self._first = re.compile(border + ("(?=[!-~])" if before_ascii else ""))
        self._last = re.compile(f".*{self._first.pattern}", re.DOTALL)
        self._looks_at = 2 if before_ascii else 1

    def first(self, text: str, start: int) -> int:
        """Returns the first place from `start` on; the text's end where there is none."""
        found = self._first.search(text, max(0, start - 1))
        return len(text) if found is None else found.end() - 1

    def last(self, text: str, stop: int) -> int:
        """Returns the last place up to and with `stop`; 0 where there is none."""
        found = self._last.match(text, 0, stop + self._looks_at)
        return 0 if found is None else found.end() - 1
