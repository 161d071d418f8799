"""Readiness follows whether the retriever fits, not whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from generator_service.errors import MismatchError, RetrieverUnavailableError
from generator_service.main import _wait_for_fit, _watch_fit
from generator_service.retrieval_client import RetrievalClient
from rag_serving.errors import RagError
from rag_serving.health import Readiness


class Retriever:
    """Answers check_fit as told."""

    def __init__(self) -> None:
        self.error: RagError | None = None
        self.checks = 0

    async def check_fit(self) -> None:
        self.checks += 1
        if self.error is not None:
            raise self.error

    async def checked_again(self) -> None:
        seen = self.checks
        while self.checks < seen + 2:  # noqa: ASYNC110  (a test's own poll)
            await asyncio.sleep(0.001)


async def watched(check: Callable[[Retriever, Readiness], Awaitable[None]]) -> None:
    retriever, readiness = Retriever(), Readiness("retriever")
    await _wait_for_fit(cast(RetrievalClient, retriever), readiness, 0.001)
    watching = asyncio.create_task(_watch_fit(cast(RetrievalClient, retriever), readiness, 0.001))
    try:
        await check(retriever, readiness)
    finally:
        watching.cancel()


async def test_an_index_that_no_longer_fits_ends_readiness_until_one_does() -> None:
    async def check(retriever: Retriever, readiness: Readiness) -> None:
        assert readiness.is_ready
        retriever.error = MismatchError("dimension: 5 here, 6 there")
        await retriever.checked_again()
        assert readiness.reasons == {"retriever": "dimension: 5 here, 6 there"}
        retriever.error = None
        await retriever.checked_again()
        assert readiness.is_ready

    await watched(check)


async def test_a_retriever_that_is_away_does_not() -> None:
    async def check(retriever: Retriever, readiness: Readiness) -> None:
        retriever.error = RetrieverUnavailableError("gone", 1.0)
        await retriever.checked_again()
        assert readiness.is_ready

    await watched(check)


async def test_the_start_waits_for_a_retriever_that_fits_and_says_why() -> None:
    retriever, readiness = Retriever(), Readiness("retriever")
    retriever.error = RetrieverUnavailableError("nobody there", 1.0)
    waiting = asyncio.create_task(_wait_for_fit(cast(RetrievalClient, retriever), readiness, 0.001))
    await retriever.checked_again()
    assert readiness.reasons == {"retriever": "nobody there"}
    retriever.error = None
    await waiting
    assert readiness.is_ready
