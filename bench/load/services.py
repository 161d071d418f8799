"""The services that load goes to: child processes on loopback, stopped with the context that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from demo.build_index import EMBEDDING_MODEL, prepare
from demo.pair import Ports, ServiceProcess, retriever_process, wait_ready
from demo.settings import DemoSettings
from generator_service.types import Batching

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0


def flags_of_generator(folder: Path) -> list[str]:
    """A generator alone: every question brings its contexts."""
    return [f"--generator={folder}", "--retriever-address="]


@contextmanager
def generators(
    flags: Sequence[str], policies: Sequence[Batching], logs: Path, threads: int
) -> Iterator[dict[Batching, str]]:
    """One generator a policy, ready; their addresses. Raises DemoError where one does not come up."""
    common = [*flags, "--devices=cpu", f"--threads={threads}", "--log-level=warning"]
    made = {
        policy: ServiceProcess(
            "generator", [*common, f"--batching={policy.value}"], _HOST, Ports(), logs / policy.value
        )
        for policy in policies
    }
    with _running(list(made.values())):
        yield {policy: service.grpc for policy, service in made.items()}


@contextmanager
def demo_retriever(logs: Path, console: Console) -> Iterator[tuple[DemoSettings, list[str]]]:
    """The demo's retriever, ready, and a generator's flags to go with it; makes the demo's files where they lack."""
    settings = DemoSettings()
    prepare(settings, console)
    retriever = retriever_process(settings.checkpoint, settings.index, logs, _HOST)
    with _running([retriever]):
        yield (
            settings,
            [
                f"--rag-checkpoint={settings.checkpoint}",
                f"--retriever-address={retriever.grpc}",
                f"--embedding-model={EMBEDDING_MODEL}",
            ],
        )


@contextmanager
def _running(services: Sequence[ServiceProcess]) -> Iterator[None]:
    with ExitStack() as stack:
        for service in services:
            service.start()
            stack.callback(service.stop)
        wait_ready(services, _START_TIMEOUT_S)
        yield
