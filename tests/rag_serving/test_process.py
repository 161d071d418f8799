"""A service's process: signals drain it, a failed start exits non-zero with a message."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rag_serving.echo import SERVICE, text_in, text_out

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """The test service as a child process."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.rag_serving.service_program", "--log-format", "json", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line_about(self, message: str) -> dict[str, Any]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record: dict[str, Any] = json.loads(line)
            if record["message"] == message:
                return record
        raise AssertionError(f"the service never logged {message!r}")

    def wait_warm(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "warm\n"

    def end(self, timeout_s: float = 20) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, err


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Service] = []

    def begin(*flags: str) -> Service:
        started.append(Service(*flags))
        return started[-1]

    yield begin
    for service in started:
        service.process.kill()
        service.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_rpc_end_and_exits_with_status_0(
    start: Any, number: signal.Signals
) -> None:
    service = start()
    address = service.line_about("listening")["grpc"]
    service.wait_warm()
    with grpc.insecure_channel(address) as channel:
        slow: Any = channel.unary_unary(
            f"/{SERVICE}/Slow", request_serializer=text_out, response_deserializer=text_in
        )
        running = slow.future("1")
        time.sleep(0.3)
        os.kill(service.process.pid, number)
        assert running.result(timeout=10) == "finished"
        status, err = service.end()
    assert status == 0
    assert '"stopped"' in err


def test_rpcs_that_outlast_the_drain_time_are_cut_off(start: Any) -> None:
    service = start("--drain-timeout-s", "0.3")
    address = service.line_about("listening")["grpc"]
    service.wait_warm()
    with grpc.insecure_channel(address) as channel:
        slow: Any = channel.unary_unary(
            f"/{SERVICE}/Slow", request_serializer=text_out, response_deserializer=text_in
        )
        running = slow.future("50")
        time.sleep(0.3)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.end()[0] == 0
        assert time.monotonic() - began < 5
        assert running.exception(timeout=5).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_garbage_collections_leave_out_what_was_loaded_before_serving(start: Any) -> None:
    """A full one took 118 ms of every search's time in the retriever, whose modules are most of its objects."""
    service = start()
    address = service.line_about("listening")["grpc"]
    service.wait_warm()
    with grpc.insecure_channel(address) as channel:
        collected: Any = channel.unary_unary(
            f"/{SERVICE}/Collected", request_serializer=text_out, response_deserializer=text_in
        )
        walked, left_out = map(int, collected("", timeout=10).split())
    assert left_out > 10 * walked


def test_a_signal_during_warm_up_stops_at_once(start: Any) -> None:
    service = start("--warm-up", "slow")
    service.line_about("listening")
    service.process.send_signal(signal.SIGTERM)
    assert service.end(10)[0] == 0


def test_a_failed_warm_up_exits_with_status_1_and_its_message(start: Any) -> None:
    status, err = start("--warm-up", "fail").end()
    assert status == 1
    assert err.splitlines()[-1] == "rag-test: error: no index in var/index: build one with rag-index build"
    assert "Traceback" not in err


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_taken_port_exits_with_status_1_and_names_the_flag(start: Any, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, err = start(flag, str(port)).end()
    assert status == 1
    assert re.search(rf"rag-test: error: cannot listen .*:{port}.*{flag}", err)
    assert "Traceback" not in err


def test_an_unknown_flag_exits_with_status_2(start: Any) -> None:
    status, err = start("--nonsense", "1").end()
    assert status == 2
    assert "unrecognized arguments: --nonsense" in err
