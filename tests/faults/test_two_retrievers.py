"""Two retrievers on one folder: one writes, the other says so and reads on; it writes once the first is gone."""

import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.retriever.v1 import retriever_service_pb2
from retriever_service.ingest.verify import verify_index
from tests.faults import kill_corpus
from tests.faults.changing_corpus import vector_of
from tests.faults.service_process import ServiceProcess, reason_of
from tests.faults.service_writer import ServiceWriter, listed, search
from tests.retriever_service.tiny_models import bpe_tokenizer, save_checkpoint, wordpiece_tokenizer


def _changes(stub: Any) -> list[Any]:
    writer = ServiceWriter("nobody", 0, {"index": {}})
    return [
        lambda: list(stub.UpsertDocuments(iter([writer.upsert()]))),
        lambda: stub.DeleteDocuments(writer.delete()),
        lambda: stub.CompactIndex(retriever_service_pb2.CompactIndexRequest()),
        lambda: stub.ActivateIndex(retriever_service_pb2.ActivateIndexRequest(index_folder="index")),
    ]


def test_the_second_retriever_refuses_to_write_and_follows_the_first(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", bpe_tokenizer(), wordpiece_tokenizer())
    folder = tmp_path / "index"
    texts = {f"ann-{row}": f"built {row}" for row in range(40)}
    documents = [{"key": key, "title": "", "text": text} for key, text in texts.items()]
    kill_corpus.build_tiny(folder, documents)
    writer = ServiceWriter("ann", 1, {"index": texts})
    processes = [ServiceProcess(folder, checkpoint)]
    try:
        first = processes[0].stub()
        processes.append(ServiceProcess(folder, checkpoint, "--follow-interval-s", "0.02"))
        second = processes[1].stub()
        index = second.GetIndex(retriever_service_pb2.GetIndexRequest())
        assert not index.writable
        for change in _changes(second):
            with pytest.raises(grpc.RpcError, match=f"another retriever writes to {folder}") as caught:
                change()
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert reason_of(caught.value) == "INDEX_READ_ONLY"
        for _ in range(10):
            writer.change(first, "index", lambda kind: None)
            verify_index(folder, lambda step: None)
        while second.GetIndex(retriever_service_pb2.GetIndexRequest()).sequence < writer.sequence:
            time.sleep(0.01)
        assert listed(second) == writer.texts["index"]
        (found,) = search(second, np.stack([vector_of("built 3")]))
        assert found == writer.texts["index"]
        # The lock goes with its process; what was acknowledged is there for the next one.
        processes.pop(0).close()
        processes.append(ServiceProcess(folder, checkpoint))
        third = processes[-1].stub()
        assert third.GetIndex(retriever_service_pb2.GetIndexRequest()).writable
        writer.settle(third, "index", listed(third))
        writer.change(third, "index", lambda kind: None)
        assert listed(third) == writer.texts["index"]
    finally:
        for process in processes:
            process.close()
