"""The two services as processes: started on free ports, read from their logs, stopped."""

import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LISTENING = re.compile(r"listening grpc=(\S+) http=(\S+)")


class Service:
    """One service; its addresses are known once it listens."""

    def __init__(self, module: str, flags: list[str], log: Path, grpc_port: int = 0) -> None:
        self.log = log
        command = [sys.executable, "-m", module, f"--grpc-port={grpc_port}", "--http-port=0", *flags]
        with log.open("ab") as stream:
            self._offset = stream.tell()
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream)
        self.grpc = self.http = ""

    @property
    def grpc_port(self) -> int:
        return int(self.grpc.rsplit(":", 1)[1])

    def said(self) -> str:
        """What it has logged, since this start."""
        return self.log.read_bytes()[self._offset :].decode("utf-8", "replace")

    def wait_listening(self, timeout_s: float = 90) -> "Service":
        def found() -> bool:
            if match := LISTENING.search(self.said()):
                self.grpc, self.http = match.groups()
            return bool(match)

        self._wait(found, "listen", timeout_s)
        return self

    def wait_ready(self, timeout_s: float = 90) -> "Service":
        self.wait_listening(timeout_s)
        self._wait(lambda: self.readyz()[0] == 200, "be ready", timeout_s)
        return self

    def wait_not_ready_because(self, pattern: str, timeout_s: float = 30) -> str:
        def found() -> bool:
            status, text = self.readyz()
            return status == 503 and re.search(pattern, text) is not None

        self._wait(found, f"say {pattern}", timeout_s)
        return self.readyz()[1]

    def readyz(self) -> tuple[int, str]:
        return self.get("/readyz")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop within {timeout_s} s\n{self.said()}") from None

    def _wait(self, done: object, what: str, timeout_s: float) -> None:
        assert callable(done)
        deadline = time.monotonic() + timeout_s
        while not done():
            status = self.process.poll()
            assert status is None, f"ended with status {status} before it could {what}\n{self.said()}"
            assert time.monotonic() < deadline, f"did not {what} within {timeout_s} s\n{self.said()}"
            time.sleep(0.1)


def start_retriever(index: Path, checkpoint: Path, log: Path, grpc_port: int = 0) -> Service:
    flags = [f"--index-folder={index}", f"--generator-checkpoint={checkpoint}"]
    return Service("retriever_service.main", flags, log, grpc_port)


def start_generator(checkpoint: Path, retriever_address: str, log: Path, *flags: str) -> Service:
    given = [f"--rag-checkpoint={checkpoint}", f"--retriever-address={retriever_address}"]
    common = ["--devices=cpu", "--threads=1", "--retriever-check-s=0.3"]
    return Service("generator_service.main", [*given, *common, *flags], log)
