"""Answers on their way: pieces that have become certain, gathered until they are worth a message."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from generator_service.engine.messages import Progress

_UNDECODED = "\N{REPLACEMENT CHARACTER}"
_MAY_CONTRACT = re.compile(r"\s(n'?|'[vr]?)$")
"""An end that the clean-up of spaces may still join to the word before: " n't", " 've", " ' "."""


@dataclass(frozen=True)
class Pacing:
    """When a piece goes out: with so many tokens, or when its first one has waited so long."""

    piece_tokens: int = 8
    piece_wait_s: float = 0.05


@dataclass(frozen=True)
class Piece:
    """Tokens of one question's answer that follow those before; document_posterior [tokens, contexts]."""

    question: int
    token_ids: list[int]
    text_delta: str
    document_posterior: list[list[float]]
    last: bool


class GrowingText:
    """The text of a growing list of tokens, given out only where no further token can change it.

    byte_token_ids are tokens that stand for single bytes: only what follows a run of them makes it text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], byte_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._decode, self._byte_token_ids = decode, byte_token_ids
        self._given = ""

    def delta(self, token_ids: Sequence[int], *, last: bool) -> str:
        """What follows the text given out before; token_ids are all tokens up to now."""
        end = len(token_ids)
        while not last and end and token_ids[end - 1] in self._byte_token_ids:
            end -= 1
        text = self._decode(token_ids[:end])
        if not last:
            text = _MAY_CONTRACT.sub("", text.rstrip(_UNDECODED).rstrip()).rstrip()
        if not text.startswith(self._given):
            return ""
        delta = text[len(self._given) :]
        self._given = text
        return delta


@dataclass
class _Growing:
    """One question's answer: tokens so far, and from `sent` on those that wait for the next piece."""

    text: GrowingText
    token_ids: list[int]
    sent: int
    document_posterior: list[list[float]] = field(default_factory=list)
    since_s: float | None = None
    ended: bool = False


class AnswerStream:
    """Takes Progress in as it comes and gives pieces out as fast as they are read.

    What is not read yet is one answer a question at most: a slow reader gets longer pieces.
    """

    def __init__(
        self, count: int, pacing: Pacing, new_text: Callable[[], GrowingText], start_token_id: int
    ) -> None:
        self._pacing = pacing
        self._news = asyncio.Event()
        self._answers = [_Growing(new_text(), [start_token_id], 1) for _ in range(count)]

    def add(self, question: int, progress: Progress) -> None:
        """Further tokens of a question; never waits."""
        answer = self._answers[question]
        answer.token_ids += progress.token_ids
        answer.document_posterior += progress.document_posterior
        answer.ended = progress.last
        if answer.since_s is None:
            answer.since_s = time.monotonic()
        self._news.set()

    async def pieces(self, answered: asyncio.Future[Any]) -> AsyncIterator[Piece]:
        """Pieces until all questions are answered, or answering has failed."""
        answered.add_done_callback(lambda _: self._news.set())
        while True:
            over = answered.done()
            self._news.clear()
            for question in range(len(self._answers)):
                if self._is_due(self._answers[question], over=over):
                    yield self._take(question)
            if over:
                return
            await self._wait()

    def sent(self, question: int) -> list[int]:
        """All tokens given out, start token first."""
        answer = self._answers[question]
        return answer.token_ids[: answer.sent]

    def _is_due(self, answer: _Growing, *, over: bool) -> bool:
        if answer.since_s is None:
            return False
        full = len(answer.token_ids) - answer.sent >= self._pacing.piece_tokens
        return over or answer.ended or full or time.monotonic() >= answer.since_s + self._pacing.piece_wait_s

    def _take(self, question: int) -> Piece:
        answer = self._answers[question]
        piece = Piece(
            question=question,
            token_ids=answer.token_ids[answer.sent :],
            text_delta=answer.text.delta(answer.token_ids, last=answer.ended),
            document_posterior=answer.document_posterior,
            last=answer.ended,
        )
        answer.sent, answer.document_posterior, answer.since_s = len(answer.token_ids), [], None
        return piece

    async def _wait(self) -> None:
        """Until there is news, or a piece has waited long enough."""
        since = [a.since_s for a in self._answers if a.since_s is not None]
        left_s = min(since) + self._pacing.piece_wait_s - time.monotonic() if since else None
        try:
            async with asyncio.timeout(left_s):  # wait_for may swallow a cancellation
                await self._news.wait()
        except TimeoutError:
            return
