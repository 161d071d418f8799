"""The demo's two services as child processes: start, wait until they serve, stop."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.build_index import EMBEDDING_MODEL, DemoError, shown_path
from demo.settings import ROOT
from rag_client import Health, RagClient

_POLL_S = 0.2
_STOP_TIMEOUT_S = 40.0
_TAIL_LINES = 12


@dataclass(frozen=True)
class Ports:
    """Where a service listens; 0 takes a free port."""

    grpc: int = 0
    http: int = 0


class ServiceProcess:
    """One service of the pair as a child process, with its log in a file.

    It gets a session of its own: a Ctrl-C on the terminal reaches only the demo, which then stops it once.
    """

    def __init__(self, name: str, flags: list[str], host: str, ports: Ports, logs: Path) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self.grpc = f"{host}:{ports.grpc or _free_port(host)}"
        self.http = f"{host}:{ports.http or _free_port(host)}"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process. Raises DemoError where a port is taken."""
        command = [str(Path(sys.executable).with_name(f"rag-{self.name}")), *self._flags]
        for kind, address in (("grpc", self.grpc), ("http", self.http)):
            host, port = address.rsplit(":", 1)
            if not _is_free(host, int(port)):
                raise DemoError(
                    f"the {self.name}'s {kind} port {port} on {host} is taken: is a pair running already?"
                    f" Stop it, or choose another with RAG_DEMO_{self.name.upper()}_{kind.upper()}_PORT"
                )
            command += [f"--{kind}-host={host}", f"--{kind}-port={port}"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def check_alive(self) -> None:
        """Raises DemoError with the end of the log where the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise DemoError(
                f"the {self.name} ended with status {self._process.returncode}\n{self.log_tail()}"
            )

    def log_tail(self) -> str:
        """The end of the log, and where the rest is."""
        lines = self.log.read_text("utf-8", "replace").splitlines()[-_TAIL_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"its log is {shown_path(self.log)}"])

    def readiness(self) -> str:
        """What /readyz says, in a line: ok, or what is missing."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/readyz", timeout=2) as page:
                text = page.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        except OSError:
            return "loading"
        return "; ".join(text.decode("utf-8", "replace").split("\n")).strip("; ")

    def stop(self) -> None:
        """Asks the process to drain and waits; one that does not end is killed, as after a second Ctrl-C."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


Serving = Callable[[ServiceProcess, float], None]


class Pair:
    """Both services over one checkpoint and one index; a context that stops them, the generator first."""

    def __init__(
        self,
        checkpoint: Path,
        index: Path,
        logs: Path,
        *,
        host: str = "127.0.0.1",
        retriever_ports: Ports | None = None,
        generator_ports: Ports | None = None,
        threads: int = 0,
    ) -> None:
        self.retriever = retriever_process(checkpoint, index, logs, host, retriever_ports)
        flags = [
            f"--rag-checkpoint={checkpoint}",
            f"--retriever-address={self.retriever.grpc}",
            f"--embedding-model={EMBEDDING_MODEL}",
            f"--threads={threads}",
        ]
        self.generator = ServiceProcess("generator", flags, host, generator_ports or Ports(), logs)

    def start(self, timeout_s: float, serving: Serving | None = None) -> None:
        """Starts both and returns once both serve; `serving` hears of each with the seconds it took.

        Raises DemoError where one ends or does not serve in time.
        """
        self.retriever.start()
        self.generator.start()
        wait_ready([self.retriever, self.generator], timeout_s, serving)
        with RagClient(self.generator.grpc, self.retriever.grpc, timeout_s=10) as client:
            for name, health in client.health().items():
                if health is not Health.SERVING:
                    raise DemoError(f"{name} is {health}, though its /readyz says ok")

    def check_alive(self) -> None:
        """Raises DemoError with the end of its log where one of the two has ended."""
        self.retriever.check_alive()
        self.generator.check_alive()

    def wait(self) -> None:
        """Returns never; raises DemoError where one of the two ends."""
        while True:
            self.check_alive()
            time.sleep(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.generator.stop()
        finally:
            self.retriever.stop()


def wait_ready(services: Sequence[ServiceProcess], timeout_s: float, serving: Serving | None = None) -> None:
    """Returns once all are ready. Raises DemoError where one ends or is not ready in time."""
    began = time.monotonic()
    waiting = list(services)
    while waiting:
        for service in services:
            service.check_alive()
        for service in [one for one in waiting if one.readiness() == "ok"]:
            waiting.remove(service)
            if serving is not None:
                serving(service, time.monotonic() - began)
        if waiting and time.monotonic() - began > timeout_s:
            late = waiting[0]
            said = f"{late.readiness()}\n{late.log_tail()}"
            raise DemoError(f"the {late.name} does not serve after {timeout_s:g} s: {said}")
        time.sleep(_POLL_S if waiting else 0)


def retriever_process(
    checkpoint: Path, index: Path, logs: Path, host: str = "127.0.0.1", ports: Ports | None = None
) -> ServiceProcess:
    """The retriever alone, not started."""
    flags = [f"--index-folder={index}", f"--generator-checkpoint={checkpoint}"]
    return ServiceProcess("retriever", flags, host, ports or Ports(), logs)


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
