"""One tiny checkpoint, its index, and a running pair that the tests share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rag_client import RagClient
from tests.integration.services import Service, start_generator, start_retriever


@dataclass(frozen=True)
class TinyPair:
    """Both services, serving, and the checkpoint that they serve."""

    retriever: Service
    generator: Service
    checkpoint: Path
    index: Path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.integration.tiny_pair import build_checkpoint

    folder = tmp_path_factory.mktemp("rag") / "checkpoint"
    build_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.integration.tiny_pair import build_index

    folder = tmp_path_factory.mktemp("rag") / "index"
    build_index(folder)
    return folder


@pytest.fixture(scope="session")
def pair(checkpoint: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPair]:
    logs = tmp_path_factory.mktemp("logs")
    retriever = start_retriever(index, checkpoint, logs / "retriever.log").wait_listening()
    generator = start_generator(checkpoint, retriever.grpc, logs / "generator.log")
    try:
        retriever.wait_ready()
        generator.wait_ready()
        yield TinyPair(retriever, generator, checkpoint, index)
    finally:
        statuses = {"generator": generator.stop(), "retriever": retriever.stop()}
    assert statuses == {"generator": 0, "retriever": 0}


@pytest.fixture
def client(pair: TinyPair) -> Iterator[RagClient]:
    with RagClient(pair.generator.grpc, pair.retriever.grpc, timeout_s=60) as one:
        yield one
