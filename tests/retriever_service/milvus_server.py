"""Milvus on loopback: its engine, or milvus-lite's server, a peer whose own limits tests name where they meet them."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary
from tests.retriever_service.milvus_standalone import StandaloneMilvus

LEASE_S = 2.0


class LiteMilvus:
    """One server process; `stop` kills it, and `start` begins another on the same port and data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the process that serves."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "milvus-lite"), "server", "--host", "127.0.0.1"),
            *("--port", str(self._port), "--data-dir", str(self._folder)),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            time.sleep(0.05)
        raise TimeoutError("milvus-lite does not listen")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


MilvusServer = LiteMilvus | StandaloneMilvus
ENGINES: dict[str, type[LiteMilvus] | type[StandaloneMilvus]] = {
    "lite": LiteMilvus,
    "standalone": StandaloneMilvus,
}


@contextlib.contextmanager
def library(uri: str, name: str, **options: Any) -> Iterator[MilvusLibrary]:
    """Opens the library of a corpus."""
    opened = MilvusLibrary(MilvusAddress(uri, timeout_s=5.0), name, **({"lease_s": LEASE_S} | options))
    try:
        yield opened
    finally:
        opened.close()


def import_folder(uri: str, name: str, folder: Path, number: int = 1, **options: Any) -> None:
    """Makes a folder the corpus of that name."""
    with library(uri, name, **options) as opened:
        corpus, generation = opened.open(folder, number, [], lambda *_: None, threading.Event())
        opened.remember(corpus, generation)
        corpus.close()
