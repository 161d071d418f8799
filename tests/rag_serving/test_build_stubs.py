"""The stub builder: what it makes can be imported, and it knows when it has nothing to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build_stubs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import build_stubs

    return build_stubs


def test_every_proto_folder_becomes_a_package_that_imports(build_stubs: ModuleType, tmp_path: Path) -> None:
    build_stubs.build(ROOT / "proto", tmp_path)
    program = "import rag.retriever.v1.retriever_service_pb2_grpc as p, sys; sys.exit(p.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == str(tmp_path / "rag/retriever/v1/retriever_service_pb2_grpc.py")
    assert {"rag.tensor.v1", "rag.retriever.v1", "rag.generator.v1"} <= set(
        build_stubs.stub_packages(ROOT / "proto")
    )
    assert (tmp_path / "rag/retriever/v1/retriever_service_pb2.pyi").exists()


def test_stubs_are_current_until_a_proto_is_newer(build_stubs: ModuleType, tmp_path: Path) -> None:
    protos = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", protos)
    assert not build_stubs.is_current(protos, tmp_path)
    build_stubs.build(protos, tmp_path)
    assert build_stubs.is_current(protos, tmp_path)
    newer = (tmp_path / "rag" / "py.typed").stat().st_mtime + 5
    os.utime(protos / "rag/tensor/v1/tensor.proto", (newer, newer))
    assert not build_stubs.is_current(protos, tmp_path)


def test_a_broken_contract_leaves_the_stubs_of_before(build_stubs: ModuleType, tmp_path: Path) -> None:
    protos = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", protos)
    build_stubs.build(protos, tmp_path)
    (protos / "rag/tensor/v1/tensor.proto").write_text("message {")
    with pytest.raises(RuntimeError, match="protoc refused"):
        build_stubs.build(protos, tmp_path)
    assert (tmp_path / "rag/tensor/v1/tensor_pb2.py").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".stubs")] == []
