"""A full disk refuses changes, by code and words, and leaves the rest; there is room, and all goes on."""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving import tensor_codec
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DiskFullError
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import cli
from retriever_service.ingest.verify import verify_index
from retriever_service.types import SearchParameters
from tests.faults import kill_corpus
from tests.faults.changing_corpus import EMBEDDING, Change, apply, vector_of
from tests.faults.service_process import ServiceProcess, reason_of
from tests.faults.service_writer import listed, search
from tests.retriever_service.tiny_models import bpe_tokenizer, save_checkpoint, wordpiece_tokenizer


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_refuses_changes_until_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        documents = [{"key": f"doc-{row}", "title": "", "text": f"built {row}"} for row in range(20)]
        kill_corpus.build_tiny(disk / "index", documents)
        corpus = LocalCorpus(disk / "index")
        try:
            filler = disk / "filler"
            written = _write_until_full(corpus, filler)
            found, _ = corpus.generation.index.search(vector_of("built 3")[None], 1, SearchParameters())
            assert found[0, 0] == 3
            assert len(corpus.generation.store) == 20 + written
            filler.unlink()
            apply(corpus, Change("upsert", "index", "after", {"after": "there is room"}))
        finally:
            corpus.close()
        corpus = LocalCorpus(disk / "index")
        try:
            assert corpus.page("after", 1).documents[0].key.startswith("big")
            assert len(corpus.generation.store) == 21 + written
            rows = corpus.generation.store.rows()
            assert np.isfinite(corpus.generation.store.embeddings_of(rows.tolist())).all()
        finally:
            corpus.close()
        verify_index(disk / "index", lambda step: None)


def _write_until_full(corpus: LocalCorpus, filler: Path) -> int:
    """Fills the disk, but for a little, and writes documents until one is refused; returns how many were not."""
    free = os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize
    filler.write_bytes(bytes(max(0, free - 600_000)))
    for number in range(100):
        big = Change("upsert", "index", f"big {number}", {f"big-{number:02d}": "x" * 50_000})
        try:
            apply(corpus, big)
        except DiskFullError:
            return number
    raise AssertionError("the disk never filled")


def _fill_up(filler: Path) -> None:
    """Leaves not one byte."""
    with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(size))


def _upsert(stub: Any, key: str, text: str) -> Any:
    request = retriever_service_pb2.UpsertDocumentsRequest(
        request_id=f"{key} {len(text)}",
        documents=[document_pb2.Document(key=key, text=text)],
        embeddings=tensor_codec.encode(vector_of(key)[None]),
    )
    (answer,) = stub.UpsertDocuments(iter([request]))
    return answer


def _delete(stub: Any, *keys: str) -> Any:
    references = [retriever_service_pb2.DocumentReference(key=key) for key in keys]
    return stub.DeleteDocuments(retriever_service_pb2.DeleteDocumentsRequest(documents=references))


def _write_without_end(stub: Any, texts: dict[str, str]) -> None:
    for number in itertools.count():
        _upsert(stub, f"big-{number:02d}", "x" * 50_000)
        texts[f"big-{number:02d}"] = "x" * 50_000


def _delete_without_end(stub: Any, texts: dict[str, str]) -> None:
    for number in itertools.count(1):
        assert _delete(stub, f"doc-{number:02d}").deleted == 1
        del texts[f"doc-{number:02d}"]


def _ended(stub: Any, operation: Any) -> Any:
    while not operation.done:
        time.sleep(0.01)
        operation = stub.GetOperation(
            retriever_service_pb2.GetOperationRequest(name=operation.name)
        ).operation
    return operation


def _compact(stub: Any) -> Any:
    return _ended(stub, stub.CompactIndex(retriever_service_pb2.CompactIndexRequest()).operation)


def _activate(stub: Any, folder: str) -> Any:
    asked = retriever_service_pb2.ActivateIndexRequest(index_folder=folder)
    return _ended(stub, stub.ActivateIndex(asked).operation)


def _refused(call: Callable[[], Any]) -> str:
    """Returns the words with which the call is refused for want of room."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    assert reason_of(caught.value) == "DISK_FULL"
    return str(caught.value.details())


def test_a_full_disk_is_told_over_the_wire_and_reading_goes_on(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", bpe_tokenizer(), wordpiece_tokenizer())
    with small_disk(tmp_path / "disk") as disk:
        documents = [{"key": f"doc-{row:02d}", "title": "", "text": f"built {row}"} for row in range(20)]
        for name in ("index", "other"):
            kill_corpus.build_tiny(disk / name, documents)
        service = ServiceProcess(disk / "index", checkpoint)
        try:
            stub = service.stub()
            texts = {one["key"]: one["text"] for one in documents}
            _delete(stub, "doc-00")
            del texts["doc-00"]
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - 400_000)))
            said = _refused(lambda: _write_without_end(stub, texts))
            assert "live-000001.sqlite: no room on the disk" in said
            _fill_up(filler)
            operation = _compact(stub)
            assert (operation.error.code, operation.error.reason) == (8, "DISK_FULL"), operation
            assert str(disk / "index") in operation.error.message
            operation = _activate(stub, "other")
            assert (operation.error.code, operation.error.reason) == (8, "DISK_FULL"), operation
            # The room that the write-ahead log already has takes some.
            said = _refused(lambda: _delete_without_end(stub, texts))
            assert "live-000001.sqlite: no room on the disk" in said
            _refused(lambda: _upsert(stub, "big", "y" * 50_000))
            assert listed(stub) == texts
            (found,) = search(stub, np.stack([vector_of("built 3")]))
            assert found == texts
            filler.unlink()
            for key in ("doc-19", "big-00"):
                assert _delete(stub, key).deleted == 1
                del texts[key]
            _upsert(stub, "big", "y" * 50_000)
            texts["big"] = "y" * 50_000
            operation = _compact(stub)
            assert operation.response.ntotal == len(texts), operation
            assert listed(stub) == texts
        finally:
            service.close()
        left = {path.name for path in (disk / "index").iterdir()}
        assert not left & {".compacting", ".building"}
        verify_index(disk / "index", lambda step: None)
        service = ServiceProcess(disk / "index", checkpoint)
        try:
            stub = service.stub()
            assert listed(stub) == texts
            (found,) = search(stub, np.stack([vector_of("big")]))
            assert found == texts
            assert _activate(stub, "other").response.ntotal == 20
        finally:
            service.close()


def _stage(folder: Path) -> str:
    return "index" if (folder / ".building" / "documents.sqlite").exists() else "documents"


def test_a_build_on_a_full_disk_says_so_and_goes_on_once_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"key": f"doc-{row}", "title": "", "text": f"built {row}"} for row in range(2000)]
    kill_corpus.build_tiny(tmp_path / "whole", documents, "HNSW32")
    arguments = ["rag-index", "build", "--input", str(tmp_path / "whole.jsonl")]
    arguments += ["--embedding-model-name", EMBEDDING.name, "--checkpoint-s", "0", "--kind", "HNSW32"]
    with small_disk(tmp_path / "disk") as disk:
        kill_corpus.build_tiny(disk / "index", documents[:20])
        monkeypatch.setattr("sys.argv", [*arguments, "--output", str(disk / "index")])
        filler = disk / "filler"
        fails_at: list[str] = []
        # Room for nothing, for a part of the documents, for all of them, for a part of the index.
        for room in range(0, 2_500_000, 70_000):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - room)))
            with pytest.raises(SystemExit) as caught:
                cli.main()
            filler.unlink()
            if caught.value.code == 0:
                break
            said = capfd.readouterr().err
            assert "Traceback" not in said
            (error,) = [line for line in said.splitlines() if line.startswith("rag-index: error:")]
            assert "no room on the disk" in error or "No space left on device" in error
            fails_at.append(_stage(disk / "index"))
            assert verify_index(disk / "index", lambda step: None).manifest.ntotal == 20
        assert {"documents", "index"} <= set(fails_at)
        built = verify_index(disk / "index", lambda step: None).manifest
        assert built.files == Snapshot.open(tmp_path / "whole").manifest.files
