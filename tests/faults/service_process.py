"""`rag-retriever` as a process of its own on loopback, to be killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rag.retriever.v1 import retriever_service_pb2_grpc
from retriever_service import main
from tests.faults import processes

_STARTS_WITHIN_S = 60.0


def serve_until_killed(arguments: list[str], log: Path) -> None:
    """What the process runs: the command, with its log in a file."""
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
    sys.argv = ["rag-retriever", *arguments]
    main.main()


def reason_of(error: grpc.RpcError) -> str:
    """Returns the reason that a status names, "" where it names none."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""


class ServiceProcess:
    """A retriever on a free port."""

    def __init__(self, index_folder: Path, checkpoint: Path, *flags: str) -> None:
        """Starts it; `stub` waits until it serves."""
        self.log = checkpoint.with_name(f"{index_folder.name}.{time.monotonic_ns()}.log")
        arguments = ["--index-folder", str(index_folder), "--generator-checkpoint", str(checkpoint)]
        arguments += ["--grpc-port", "0", "--http-port", "0", "--log-format", "json", "--search-threads", "1"]
        self._process = processes.context().Process(
            target=serve_until_killed, args=([*arguments, *flags], self.log), daemon=True
        )
        self._channel: grpc.Channel | None = None
        self._process.start()

    def stub(self) -> Any:
        """Returns a stub once the retriever serves. Raises AssertionError, with its log, where it ends instead."""
        ends_at_s = time.monotonic() + _STARTS_WITHIN_S
        while (records := self._records()).keys().isdisjoint({"serving"}):
            assert self._process.is_alive(), f"the retriever ended: {self.said()}"
            assert time.monotonic() < ends_at_s, f"the retriever does not serve: {self.said()}"
            time.sleep(0.005)
        self._channel = grpc.insecure_channel(records["listening"]["grpc"])
        return retriever_service_pb2_grpc.RetrieverServiceStub(self._channel)

    def said(self) -> str:
        """Returns its log."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def ended(self) -> int:
        """Waits until it has ended by itself; returns its exit status."""
        self._process.join(_STARTS_WITHIN_S)
        assert self._process.exitcode is not None, "the retriever goes on"
        return self._process.exitcode

    def kill(self) -> None:
        """Ends it by SIGKILL; its stub can still be called. Raises AssertionError where it had ended before."""
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL, f"the retriever ended by itself: {self.said()}"
        self.log.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends it by SIGKILL, and closes the channel."""
        self.kill()
        if self._channel is not None:
            self._channel.close()

    def _records(self) -> dict[str, Any]:
        """Returns the whole lines of its log by message."""
        lines = self.said().rpartition("\n")[0].splitlines()
        return {record["message"]: record for record in map(json.loads, lines)}
