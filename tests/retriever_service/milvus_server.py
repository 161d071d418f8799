"""Milvus on loopback: its engine, or milvus-lite's server, a peer whose own limits tests name where they meet them."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary
from tests.retriever_service.milvus_process import MilvusProcess
from tests.retriever_service.milvus_standalone import StandaloneMilvus

LEASE_S = 2.0
_STARTS_WITHIN_S = 60.0


class LiteMilvus(MilvusProcess):
    """One server process; `stop` kills it, and `start` begins another on the same port and data."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "milvus-lite"), "server", "--host", "127.0.0.1"),
            *("--port", str(self._port), "--data-dir", str(self._folder)),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._await(self._listens, _STARTS_WITHIN_S)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False


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
