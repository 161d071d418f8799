"""Sends requests made beforehand: at given moments (open loop), or as soon as one is answered (closed loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from bench.load.latency import OK, Outcome
from rag_serving.channel import open_channel

GENERATE = "/rag.generator.v1.GeneratorService/Generate"


class Driver:
    """Calls one service with bytes; what comes back is not even parsed, to leave the processor to the service."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self._call: Any = channel.unary_unary(GENERATE)
        self._timeout_s = timeout_s

    async def open_loop(self, requests: Sequence[bytes], due_s: npt.NDArray[np.float64]) -> list[Outcome]:
        """Sends requests[i] at due_s[i] seconds from now, whether or not those before it are answered.

        A latency counts from the moment the request was due: one that waits in this process waits all the same.
        """
        began = time.perf_counter()
        tasks = []
        for request, due in zip(requests, due_s, strict=True):
            pause_s = began + due - time.perf_counter()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            tasks.append(asyncio.create_task(self._outcome(request, began + due)))
        return list(await asyncio.gather(*tasks))

    async def closed_loop(self, requests: Sequence[bytes], concurrency: int) -> tuple[list[Outcome], float]:
        """Keeps `concurrency` requests at the service until all are answered; the outcomes, and the seconds it took."""
        left = iter(requests)
        outcomes: list[Outcome] = []
        began = time.perf_counter()
        await asyncio.gather(*(self._ask_all(left, outcomes) for _ in range(concurrency)))
        return outcomes, time.perf_counter() - began

    async def _ask_all(self, left: Iterator[bytes], outcomes: list[Outcome]) -> None:
        for request in left:  # shared with the others: each takes the next one
            outcome = await self._outcome(request, time.perf_counter())
            outcomes.append(outcome)

    async def _outcome(self, request: bytes, due_s: float) -> Outcome:
        lag_s = time.perf_counter() - due_s
        code = OK
        try:
            await self._call(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        return Outcome(code, time.perf_counter() - due_s, lag_s)


@asynccontextmanager
async def connect(address: str, timeout_s: float = 120.0) -> AsyncIterator[Driver]:
    """A driver of the service at an address; nothing is sent again, so that each failure is counted."""
    channel = open_channel(address)
    try:
        yield Driver(channel, timeout_s)
    finally:
        await channel.close()
