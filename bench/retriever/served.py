"""A rag-retriever process and the clients that ask it."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.retriever.workload import CHECKPOINT, N_DOCS, Floats
from rag.retriever.v1 import document_pb2
from rag.retriever.v1 import retriever_service_pb2 as messages
from rag_serving import tensor_codec

_LISTENING = re.compile(r"listening grpc=(\S+) http=(\S+)")
_START_TIMEOUT_S = 120
_CHANNELS = 4
_RETRIEVE = "/rag.retriever.v1.RetrieverService/Retrieve"


@dataclass(frozen=True)
class Served:
    """A running retriever."""

    process: subprocess.Popen[bytes]
    address: str
    ready_after_s: float

    def memory_mib(self) -> float:
        """Resident memory that no other process shares, in MiB: pages of a file that it alone has mapped, too."""
        found = psutil.Process(self.process.pid).memory_full_info()
        return found.uss / 2**20

    def resident_mib(self) -> float:
        """All resident memory, mapped files included, in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@contextmanager
def served(index_folder: Path, *flags: str) -> Iterator[Served]:
    """Starts rag-retriever on a free port of loopback; stops it at the end."""
    with tempfile.TemporaryFile() as log:
        command = [
            *(sys.executable, "-m", "retriever_service.main"),
            *("--grpc-port=0", "--http-port=0", "--grpc-host=127.0.0.1", "--http-host=127.0.0.1"),
            *(f"--index-folder={index_folder}", f"--generator-checkpoint={CHECKPOINT}", "--verify=false"),
            *flags,
        ]
        began_s = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            address = _wait_ready(process, log)
            yield Served(process, address, time.monotonic() - began_s)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], log: Any) -> str:
    """Returns the gRPC address once /readyz says yes."""
    for _ in range(_START_TIMEOUT_S * 50):
        log.seek(0)
        said = log.read().decode()
        match = _LISTENING.search(said)
        if match is not None:
            try:
                with urllib.request.urlopen(f"http://{match[2]}/readyz", timeout=5):
                    return match[1]
            except urllib.error.URLError:
                pass
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"rag-retriever did not start:\n{said}")


@dataclass(frozen=True)
class Load:
    """What clients saw: answers a second (searches where each asks one question), latencies in seconds."""

    searches_per_s: float
    latencies_s: Sequence[float]
    answers: dict[int, bytes]

    def quantile_ms(self, share: float) -> float:
        """The latency in milliseconds that this share of the answers stayed under."""
        if not self.latencies_s:
            raise RuntimeError("no question was answered within the measurement")
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def rows(self) -> dict[int, list[int]]:
        """The rows of each question that was answered."""
        return {
            question: tensor_codec.decode(
                messages.RetrieveResponse.FromString(answer).retrieved_doc_ids, "retrieved_doc_ids"
            )[0].tolist()
            for question, answer in self.answers.items()
        }


def requests(questions: Floats, texts: Sequence[str], *, contexts: bool, size: int = 1) -> list[bytes]:
    """Requests of `size` questions each, as the generator sends them, in their wire format."""
    return [
        messages.RetrieveRequest(
            question_hidden_states=tensor_codec.encode(questions[start : start + size]),
            question_texts=document_pb2.QuestionTexts(texts=texts[start : start + size]),
            n_docs=N_DOCS,
            skip_contexts=not contexts,
        ).SerializeToString()
        for start in range(0, len(questions), size)
    ]


def ask(address: str, asked: Sequence[bytes], *, clients: int, seconds: float, pause_s: float = 0.0) -> Load:
    """Each client asks, waits for the answer, pauses and asks again, for so many seconds; a fifth more warms up.

    Pauses are of 0 to twice `pause_s`: clients that pause alike, once answered together, come together ever after.
    Time goes on to the first answer, where that comes later.
    The clients share a core with the service: they send and keep bytes, and read them once all is over.
    """
    return asyncio.run(ask_until(address, asked, clients, seconds, seconds / 5, pause_s))


def ask_each(address: str, asked: Sequence[bytes], *, clients: int) -> None:
    """Asks each question once, so that what the service keeps of documents it has read is there."""
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(clients) as pool:
        for _ in pool.map(channel.unary_unary(_RETRIEVE), asked):
            pass


async def ask_until(
    address: str,
    asked: Sequence[bytes],
    clients: int,
    seconds: float,
    warm_up_s: float,
    pause_s: float,
    stopped: asyncio.Event | None = None,
) -> Load:
    """As `ask`, inside an event loop; `stopped` ends it before its time."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(min(clients, _CHANNELS))]
    calls = [channel.unary_unary(_RETRIEVE) for channel in channels]
    latencies: list[float] = []
    answers: dict[int, bytes] = {}
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    began_s = time.perf_counter() + warm_up_s
    ends_s = began_s + seconds

    async def client(number: int) -> None:
        nonlocal ends_s
        retrieve = calls[number % len(calls)]
        position = number
        chance = random.Random(number)
        await asyncio.sleep(chance.uniform(0, 2 * pause_s))
        while stopped is None or not stopped.is_set():
            sent_s = time.perf_counter()
            if sent_s >= ends_s:
                return
            answer = await retrieve(asked[position % len(asked)])
            answered_s = time.perf_counter()
            # Whenever it was sent: to leave out what was under way at the beginning takes a whole latency off.
            if not latencies:
                ends_s = max(ends_s, answered_s)
            if began_s <= answered_s <= ends_s:
                latencies.append(answered_s - sent_s)
                answers.setdefault(position % len(asked), answer)
            position += clients
            if pause_s:
                await asyncio.sleep(chance.uniform(0, 2 * pause_s))

    try:
        await asyncio.gather(*(client(number) for number in range(clients)))
    finally:
        for channel in channels:
            await channel.close()
    lasted_s = min(time.perf_counter(), ends_s) - began_s
    return Load(len(latencies) / lasted_s, latencies, answers)
