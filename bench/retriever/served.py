"""A rag-retriever process and the clients that ask it."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.retriever.workload import CHECKPOINT, N_DOCS, Floats
from rag.retriever.v1 import document_pb2, retriever_service_pb2_grpc
from rag.retriever.v1 import retriever_service_pb2 as messages
from rag_serving import tensor_codec

_LISTENING = re.compile(r"listening grpc=(\S+) http=(\S+)")
_START_TIMEOUT_S = 120
_CHANNELS = 4


@dataclass(frozen=True)
class Served:
    """A running retriever."""

    process: subprocess.Popen[bytes]
    address: str
    ready_after_s: float

    def memory_mib(self) -> float:
        """Resident memory that is its own, in MiB; pages of a mapped file that others could take are left out."""
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
    """What clients saw: answers a second, and each answer's latency in seconds."""

    searches_per_s: float
    latencies_s: Sequence[float]
    rows: dict[int, list[int]]

    def quantile_ms(self, share: float) -> float:
        """The latency in milliseconds that this share of the answers stayed under."""
        if not self.latencies_s:
            raise RuntimeError("no question was answered within the measurement: give more --seconds")
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def requests(questions: Floats, texts: Sequence[str], *, contexts: bool) -> list[messages.RetrieveRequest]:
    """One request a question, as the generator sends it."""
    return [
        messages.RetrieveRequest(
            question_hidden_states=tensor_codec.encode(vector[None]),
            question_texts=document_pb2.QuestionTexts(texts=[text]),
            n_docs=N_DOCS,
            skip_contexts=not contexts,
        )
        for vector, text in zip(questions, texts, strict=True)
    ]


def ask(address: str, asked: Sequence[messages.RetrieveRequest], *, clients: int, seconds: float) -> Load:
    """Each client asks, waits for the answer and asks again, for so many seconds; a fifth more warms up."""
    return asyncio.run(_ask(address, asked, clients, seconds))


async def _ask(address: str, asked: Sequence[Any], clients: int, seconds: float) -> Load:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(min(clients, _CHANNELS))]
    stubs = [retriever_service_pb2_grpc.RetrieverServiceStub(channel) for channel in channels]
    latencies: list[float] = []
    rows: dict[int, list[int]] = {}
    began_s = time.perf_counter() + seconds / 5
    ends_s = began_s + seconds

    async def client(number: int) -> None:
        retrieve = stubs[number % len(stubs)].Retrieve
        position = number
        while True:
            sent_s = time.perf_counter()
            if sent_s >= ends_s:
                return
            answer = await retrieve(asked[position % len(asked)])
            answered_s = time.perf_counter()
            if sent_s >= began_s and answered_s <= ends_s:
                latencies.append(answered_s - sent_s)
                rows[position % len(asked)] = tensor_codec.decode(
                    answer.retrieved_doc_ids, "retrieved_doc_ids"
                )[0].tolist()
            position += clients

    try:
        await asyncio.gather(*(client(number) for number in range(clients)))
    finally:
        for channel in channels:
            await channel.close()
    return Load(len(latencies) / seconds, latencies, rows)
