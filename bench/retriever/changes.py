"""A corpus that changes while it is searched: durable upserts a second, and what searches wait meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.retriever.served import Load, ask, ask_until, served
from bench.retriever.workload import Corpus, Floats, passages
from rag.retriever.v1 import document_pb2, retriever_service_pb2_grpc
from rag.retriever.v1 import retriever_service_pb2 as messages
from rag_serving import tensor_codec

_CLIENTS = 4
_PAUSE_S = 0.1
_BATCH = 100
_LONGEST_S = 400.0


@dataclass(frozen=True)
class Changes:
    """Searches beside nothing, beside upserts and beside compactions; upserts by batches of 100 and of 1.

    The first compaction takes in all that was upserted; `compacted` are searches beside nothing after it, and
    `compacting` those beside further ones, of a hundred documents each.
    """

    idle: Load
    upserting: Load
    first_compacting: Load
    compacted: Load
    compacting: Load
    upserts_per_s: float
    single_upserts_per_s: float
    compaction_s: float


def measure_changes(
    corpus: Corpus, index_folder: Path, scratch: Path, asked: list[bytes], seconds: float
) -> Changes:
    """Works on a copy of the index folder that shares its files, which are never written again."""
    with _copy(index_folder, scratch) as copy, served(copy, "--compact-after=0") as service:
        address = service.address
        idle = ask(address, asked, clients=_CLIENTS, seconds=2 * seconds, pause_s=_PAUSE_S)
        single = asyncio.run(_upsert(address, corpus, seconds, batch=1))
        upserting, upserts_per_s = asyncio.run(_while_upserting(address, corpus, asked, 2 * seconds))
        first, compaction_s = asyncio.run(_while_compacting(address, asked))
        compacted = ask(address, asked, clients=_CLIENTS, seconds=2 * seconds, pause_s=_PAUSE_S)
        again: list[Load] = []
        ends_s = time.monotonic() + 2 * seconds
        while time.monotonic() < ends_s:
            asyncio.run(_upsert(address, corpus, 0.0, batch=_BATCH))
            again.append(asyncio.run(_while_compacting(address, asked))[0])
    return Changes(idle, upserting, first, compacted, _joined(again), upserts_per_s, single, compaction_s)


def _joined(loads: list[Load]) -> Load:
    latencies_s = [one for load in loads for one in load.latencies_s]
    return Load(sum(load.searches_per_s for load in loads) / len(loads), latencies_s, {})


async def _while_upserting(
    address: str, corpus: Corpus, asked: list[bytes], seconds: float
) -> tuple[Load, float]:
    load, upserts_per_s = await asyncio.gather(
        ask_until(address, asked, _CLIENTS, seconds, 0.0, _PAUSE_S),
        _upsert(address, corpus, seconds, batch=_BATCH),
    )
    return load, upserts_per_s


async def _while_compacting(address: str, asked: list[bytes]) -> tuple[Load, float]:
    done = asyncio.Event()

    async def compact() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = retriever_service_pb2_grpc.RetrieverServiceStub(channel)
            began_s = time.perf_counter()
            operation = (await stub.CompactIndex(messages.CompactIndexRequest())).operation
            while not operation.done:
                await asyncio.sleep(0.1)
                operation = (
                    await stub.GetOperation(messages.GetOperationRequest(name=operation.name))
                ).operation
            done.set()
            if operation.HasField("error"):
                raise RuntimeError(operation.error.message)
            return time.perf_counter() - began_s

    load, took_s = await asyncio.gather(
        ask_until(address, asked, _CLIENTS, _LONGEST_S, 0.0, _PAUSE_S, done), compact()
    )
    return load, took_s


async def _upsert(address: str, corpus: Corpus, seconds: float, *, batch: int) -> float:
    """Documents a second of one stream: each batch, one at least, is sent once the one before is acknowledged."""
    vectors, texts = corpus.vectors(0), passages()
    ends_s = time.perf_counter() + seconds
    acknowledged = asyncio.Event()
    written = 0

    async def batches() -> AsyncIterator[messages.UpsertDocumentsRequest]:
        number = 0
        while number == 0 or time.perf_counter() < ends_s:
            acknowledged.clear()
            yield _request(vectors, texts, number, batch)
            number += 1
            await acknowledged.wait()

    async with grpc.aio.insecure_channel(address) as channel:
        stub = retriever_service_pb2_grpc.RetrieverServiceStub(channel)
        began_s = time.perf_counter()
        async for answer in stub.UpsertDocuments(batches()):
            written += len(answer.rows)
            acknowledged.set()
        return written / (time.perf_counter() - began_s)


def _request(
    vectors: Floats, texts: list[tuple[str, str]], number: int, batch: int
) -> messages.UpsertDocumentsRequest:
    """New documents, and for every second batch of them the ones of the batch before again, replaced."""
    places = range(number // 2 * batch, (number // 2 + 1) * batch)
    return messages.UpsertDocumentsRequest(
        documents=[
            document_pb2.Document(
                key=f"new-{batch}-{place}",
                title=texts[place % len(texts)][0],
                text=texts[place % len(texts)][1],
            )
            for place in places
        ],
        embeddings=tensor_codec.encode(vectors[[place % len(vectors) for place in places]]),
    )


@contextmanager
def _copy(index_folder: Path, scratch: Path) -> Iterator[Path]:
    copy = scratch / f"{index_folder.name}-changes-{os.getpid()}"
    copy.mkdir()
    try:
        shutil.copy(index_folder / "CURRENT", copy)
        for generation in index_folder.glob("generation-*"):
            shutil.copytree(generation, copy / generation.name, copy_function=os.link)
        yield copy
    finally:
        shutil.rmtree(copy)
