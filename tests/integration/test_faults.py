"""What the pair does when its sides do not fit, when one goes away, and when it is told to stop."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rag_client import GENERATOR_SERVICE, Generation, Health, RagClient, RefusedError, UnavailableError
from tests.integration.services import Service, start_generator, start_retriever
from tests.integration.tiny_pair import DIMENSION, build_index, letters, tokenizer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def other_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "index"
    build_index(folder, dimension=8)
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    words = letters()
    words[4], words[5] = words[5], words[4]
    tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture
def running() -> Iterator[list[Service]]:
    """Services to kill in the end, whatever happened."""
    services: list[Service] = []
    yield services
    with ExitStack() as stack:
        for service in services:
            stack.callback(service.process.wait)
            stack.callback(service.process.kill)


def test_a_generator_waits_for_a_retriever_that_fits_and_outlives_it(
    checkpoint: Path,
    index: Path,
    other_index: Path,
    other_tokenizer: Path,
    tmp_path: Path,
    running: list[Service],
) -> None:
    port = free_port()
    log = tmp_path / "retriever.log"

    def retriever(folder: Path, tokens: Path) -> Service:
        running.append(start_retriever(folder, tokens, log, port))
        return running[-1].wait_ready()

    generator = start_generator(checkpoint, f"127.0.0.1:{port}", tmp_path / "generator.log")
    running.append(generator)
    other_dimension = retriever(other_index, checkpoint)
    generator.wait_listening()
    with RagClient(generator.grpc, timeout_s=20) as client:
        digest = client.get_model().context_tokenizer_digest

        why = generator.wait_not_ready_because("dimension")
        assert "8" in why
        assert str(DIMENSION) in why
        assert client.health() == {GENERATOR_SERVICE: Health.NOT_SERVING}
        with pytest.raises(RefusedError, match="dimension"):
            client.generate("ti", max_length=4)
        assert other_dimension.stop() == 0

        why = generator.wait_not_ready_because("not available")
        assert f"127.0.0.1:{port}" in why

        right = retriever(index, checkpoint)
        generator.wait_ready()
        assert client.health() == {GENERATOR_SERVICE: Health.SERVING}
        before = client.generate("ti", max_length=6).answers[0].best

        assert right.stop(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(UnavailableError, match=f"retriever at 127.0.0.1:{port}") as down:
            client.generate("ti", max_length=6)
        assert down.value.reason == "RETRIEVER_UNAVAILABLE"
        assert down.value.retry_after_s is not None

        again = retriever(index, checkpoint)
        assert once_available(client).answers[0].best.token_ids == before.token_ids
        assert again.stop() == 0

        other_tokens = retriever(index, other_tokenizer)
        with pytest.raises(RefusedError, match="context_tokenizer_digest") as refused:
            once_available(client)
        assert digest in refused.value.message
        assert refused.value.message.count("sha256:") == 2
        assert other_tokens.stop() == 0
    assert generator.stop() == 0


def once_available(client: RagClient) -> Generation:
    """The first answer that is not UNAVAILABLE: after a restart a channel waits before it connects again."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return client.generate("ti", max_length=6)
        except UnavailableError:
            assert time.monotonic() < deadline, "the generator did not find the restarted retriever"
            time.sleep(0.2)


def test_a_service_that_cannot_start_says_why_and_exits(
    checkpoint: Path, index: Path, tmp_path: Path, running: list[Service]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        missing = start_retriever(tmp_path / "nowhere", checkpoint, tmp_path / "missing.log")
        blocked = start_retriever(index, checkpoint, tmp_path / "blocked.log", port)
        no_model = start_generator(tmp_path / "nowhere", "127.0.0.1:1", tmp_path / "no_model.log")
        running += [missing, blocked, no_model]
        for service, said in (
            (missing, "nowhere"),
            (blocked, f"cannot listen for gRPC on 127.0.0.1:{port}"),
            (no_model, "there is no folder"),
        ):
            assert service.process.wait(60) == 1
            assert said in service.said()
            assert "Traceback" not in service.said()


def test_a_damaged_index_is_named_before_serving(
    checkpoint: Path, tmp_path: Path, running: list[Service]
) -> None:
    build_index(tmp_path / "index")
    faiss_file = next((tmp_path / "index").rglob("*.faiss"))
    damaged = bytearray(faiss_file.read_bytes())
    damaged[-5] ^= 1
    faiss_file.write_bytes(damaged)
    service = start_retriever(tmp_path / "index", checkpoint, tmp_path / "retriever.log")
    running.append(service)
    assert service.process.wait(60) == 1
    assert faiss_file.name in service.said()
