"""`rag-retriever` as a process: what it needs to start, how it says it serves, how it stops."""

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rag.retriever.v1 import document_pb2, retriever_service_pb2, retriever_service_pb2_grpc
from rag_serving import tensor_codec

SERVICE = "rag.retriever.v1.RetrieverService"


def command(index_folder: Path, checkpoint: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-W", "error", "-m", "retriever_service.main"),
        *("--index-folder", str(index_folder), "--generator-checkpoint", str(checkpoint)),
        *("--grpc-port", "0", "--http-port", "0", "--log-format", "json", *flags),
    ]


@pytest.fixture
def running(index_folder: Path, checkpoint: Path) -> Iterator[Any]:
    import json

    process = subprocess.Popen(command(index_folder, checkpoint), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    addresses: dict[str, str] = {}
    for line in process.stderr:
        record = json.loads(line)
        addresses |= {name: record[name] for name in ("grpc", "http") if name in record}
        if record["message"] == "serving":
            break
    yield process, addresses
    process.kill()
    process.wait(10)
    process.stderr.close()


def test_service_is_healthy_reflected_and_measured_and_stops_on_sigterm(running: Any) -> None:
    process, addresses = running
    with grpc.insecure_channel(addresses["grpc"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in (SERVICE, ""):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        listed = next(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
        )
        assert SERVICE in {service.name for service in listed.list_services_response.service}
        stub = retriever_service_pb2_grpc.RetrieverServiceStub(channel)
        answer = stub.Retrieve(
            retriever_service_pb2.RetrieveRequest(
                question_hidden_states=tensor_codec.encode(np.ones((1, 16), np.float32)),
                question_texts=document_pb2.QuestionTexts(texts=["who"]),
            )
        )
        assert answer.n_docs == 5
    with urllib.request.urlopen(f"http://{addresses['http']}/readyz") as ready:
        assert ready.status == 200
    with urllib.request.urlopen(f"http://{addresses['http']}/metrics") as exposition:
        metrics = exposition.read().decode()
    for line in (
        "rag_retriever_index_vectors 60.0",
        "rag_retriever_index_generation 1.0",
        "rag_retriever_search_seconds_count 2.0",
        "rag_retriever_queue_wait_seconds_count 2.0",
        "rag_retriever_assemble_seconds_count 2.0",
        "rag_retriever_docs_found_sum 10.0",
    ):
        assert line in metrics
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def damaged(index_folder: Path, tmp_path: Path) -> Path:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(index_folder, folder)
    file = folder / "generation-000001" / "index.faiss"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    return folder


@pytest.mark.parametrize("case", ["missing index", "damaged index", "missing tokenizer"])
def test_what_cannot_be_served_ends_the_process_with_a_clear_message(
    index_folder: Path, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    folder, tokenizer, said = {
        "missing index": (tmp_path, checkpoint, "build one with `rag-index build"),
        "damaged index": (damaged(index_folder, tmp_path), checkpoint, "index.faiss: sha256 is"),
        "missing tokenizer": (index_folder, tmp_path, "no tokenizer in"),
    }[case]
    done = subprocess.run(command(folder, tokenizer), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rag-retriever: error: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_default_above_the_limit_is_refused(index_folder: Path, checkpoint: Path) -> None:
    arguments = command(index_folder, checkpoint, "--default-n-docs", "200")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "default_n_docs 200 is above max_n_docs 100" in done.stderr
