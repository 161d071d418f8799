"""Kills `rag-retriever` under clients that change its corpus, again and again, and asks the next one over the wire."""

import collections
import queue
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving import tensor_codec
from retriever_service.index.faiss_index import set_num_threads
from retriever_service.ingest.verify import verify_index
from tests.faults.changing_corpus import FOLDERS, vector_of
from tests.faults.kill_corpus import build_tiny
from tests.faults.service_process import ServiceProcess
from tests.faults.service_writer import MAX_N_DOCS, ServiceWriter, Texts, is_lost, listed, search
from tests.retriever_service.tiny_models import bpe_tokenizer, save_checkpoint, wordpiece_tokenizer

KINDS = ("upsert", "delete", "compact", "activate", "start")
_KINDS_OF_INDEX = {"flat": "Flat", "graph": "HNSW8"}
_WRITERS = ("ann", "bob")
_BUILT = 60
_LONGEST_S = 0.05


class KilledService:
    """Two index folders, of which one serves, two writers, and a client that compacts and activates."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._home = root / FOLDERS[0]
        self._random = random.Random(seed)
        self._checkpoint = save_checkpoint(root / "checkpoint", bpe_tokenizer(), wordpiece_tokenizer())
        documents = [
            {"key": f"{_WRITERS[row % 2]}-{row // 2}", "title": "", "text": f"built {row}"}
            for row in range(_BUILT)
        ]
        for name in FOLDERS:
            build_tiny(root / name, documents, _KINDS_OF_INDEX[name])
        self._writers = []
        for place, name in enumerate(_WRITERS):
            texts = {one["key"]: one["text"] for one in documents if one["key"].startswith(f"{name}-")}
            self._writers.append(ServiceWriter(name, seed + place, dict.fromkeys(FOLDERS, texts)))
        self._active = FOLDERS[0]
        self._switching = ""
        self._generation = 0
        self._start_took_s = 1.0
        self._took_s = dict.fromkeys(KINDS, 0.01)
        self._begun: queue.Queue[str] = queue.Queue()
        self._failures: list[str] = []
        self._is_over = threading.Event()
        self._start()

    @property
    def acknowledged(self) -> int:
        """Batches that were acknowledged."""
        return sum(writer.acknowledged for writer in self._writers)

    def kill_during(self, kind: str) -> list[str]:
        """Kills the service in or soon after a call of this kind, starts it again and asks what is there.

        Returns the kinds of the calls that it was killed in. Raises AssertionError.
        """
        if kind == "start":
            self._process.close()
            self._process = ServiceProcess(*self._arguments)
            time.sleep(self._random.uniform(0, self._start_took_s))
            self._process.close()
            under_way = ["start"]
        else:
            under_way = self._kill_under_load(kind)
        self._start()
        self._check()
        # Beside the retriever: it must be what recovers the write-ahead log.
        for name in FOLDERS:
            verify_index(self._root / name, lambda step: None)
        return under_way

    def stop(self) -> None:
        """Ends the service."""
        self._process.close()

    @property
    def _arguments(self) -> tuple[Path, Path, str, str]:
        return self._home, self._checkpoint, "--max-n-docs", str(MAX_N_DOCS)

    def _start(self) -> None:
        began_s = time.monotonic()
        self._process = ServiceProcess(*self._arguments)
        self._stub = self._process.stub()
        self._start_took_s = time.monotonic() - began_s

    def _kill_under_load(self, kind: str) -> list[str]:
        self._is_over.clear()
        self._begun = queue.Queue()
        clients = [
            threading.Thread(target=self._until_lost, args=(self._write, one)) for one in self._writers
        ]
        if kind in {"compact", "activate"}:
            clients.append(threading.Thread(target=self._until_lost, args=(self._switch, None)))
        for client in clients:
            client.start()
        try:
            for _ in range(self._random.randint(1, 4)):
                while self._begun.get(timeout=60) != kind:
                    assert not self._failures, self._failures
            time.sleep(self._random.uniform(0, 1.2) * self._took_s[kind])
        finally:
            self._is_over.set()
            self._process.kill()
            for client in clients:
                client.join()
            self._process.close()
        assert not self._failures, self._failures
        under_way = [self._switching] if self._switching else []
        for writer in self._writers:
            under_way += ["upsert" if hasattr(one, "embeddings") else "delete" for one in writer.pending[:1]]
        return under_way

    def _until_lost(self, work: Callable[[Any], None], of: Any) -> None:
        """Works without pause until the service is lost."""
        try:
            while True:
                work(of)
        except grpc.RpcError as error:
            if not (is_lost(error) and self._is_over.is_set()):
                self._fail(f"{error.code()}: {error.details()}")
        except AssertionError as error:
            self._fail(str(error))

    def _fail(self, what: str) -> None:
        self._failures.append(what)
        self._begun.put("")

    def _write(self, writer: ServiceWriter) -> None:
        with writer.busy:
            began_s = time.monotonic()
            kinds: list[str] = []
            writer.change(
                self._stub, self._active, lambda kind: (kinds.append(kind), self._begun.put(kind))[1]
            )
            self._note_time(kinds[0], began_s)

    def _switch(self, _: None) -> None:
        """Compacts, activates what serves under the writers' changes, or the other folder between them.

        The wire does not say which folder a change went to that was made while another one was activated.
        """
        choice = self._random.choice(("compact", "same", "other"))
        began_s = time.monotonic()
        if choice == "compact":
            kind, asked, call = (
                "compact",
                retriever_service_pb2.CompactIndexRequest(),
                self._stub.CompactIndex,
            )
            self._finish(kind, call, asked, self._active)
        else:
            kind, call = "activate", self._stub.ActivateIndex
            folder = self._active
            if choice == "other":
                (folder,) = set(FOLDERS) - {folder}
            asked = retriever_service_pb2.ActivateIndexRequest(index_folder=folder)
            if choice == "same":
                self._finish(kind, call, asked, folder)
            else:
                with self._writers[0].busy, self._writers[1].busy:
                    self._finish(kind, call, asked, folder)
        self._note_time(kind, began_s)

    def _finish(self, kind: str, call: Any, asked: Any, folder: str) -> None:
        """Begins an operation and waits for its end."""
        self._switching = f"{kind} {folder}"
        self._begun.put(kind)
        operation = call(asked).operation
        while not operation.done:
            time.sleep(0.002)
            name = retriever_service_pb2.GetOperationRequest(name=operation.name)
            operation = self._stub.GetOperation(name).operation
        assert not operation.HasField("error"), operation.error
        assert operation.response.generation > self._generation, "the number of a generation came back"
        self._generation = operation.response.generation
        self._active = folder
        self._switching = ""

    def _note_time(self, kind: str, began_s: float) -> None:
        took_s = min(_LONGEST_S, time.monotonic() - began_s)
        self._took_s[kind] += 0.2 * (took_s - self._took_s[kind])

    def _check(self) -> None:
        index = self._stub.GetIndex(retriever_service_pb2.GetIndexRequest())
        kind, _, folder = self._switching.partition(" ")
        serves = Path(index.index_folder).name
        allowed = {self._active, folder} if kind == "activate" else {self._active}
        assert serves in allowed, f"{serves} serves, not {allowed}"
        assert index.generation >= self._generation, "the number of a generation came back"
        self._active, self._generation, self._switching = serves, index.generation, ""
        found = listed(self._stub)
        for writer in self._writers:
            writer.settle(self._stub, serves, found)
        wanted: Texts = {}
        for writer in self._writers:
            wanted |= writer.texts[serves]
        assert listed(self._stub) == wanted, "the listing is not what was acknowledged"
        asked = [text for writer in self._writers for text in writer.gone[-4:]] + list(wanted.values())[:4]
        for found in search(self._stub, np.stack([vector_of(text) for text in asked])):
            assert found.items() <= wanted.items(), "something deleted is found"
            if _KINDS_OF_INDEX[serves] == "Flat":
                assert found == wanted, "an acknowledged document is not found"
        self._check_contexts(wanted)

    def _check_contexts(self, wanted: Texts) -> None:
        """What a generator asks for: contexts of the nearest documents."""
        text = next(iter(wanted.values()))
        answer = self._stub.Retrieve(
            retriever_service_pb2.RetrieveRequest(
                question_hidden_states=tensor_codec.encode(vector_of(text)[None]),
                question_texts=document_pb2.QuestionTexts(texts=["who"]),
                n_docs=5,
            )
        )
        assert tensor_codec.decode(answer.context_input_ids, "answer").shape[0] == min(5, len(wanted))


def run(root: Path, kills: int, seed: int, *, say: bool = False) -> collections.Counter[str]:
    """Kills the service so often; returns what it was killed in. Raises AssertionError."""
    set_num_threads(1)
    service = KilledService(root, seed)
    counts: collections.Counter[str] = collections.Counter()
    try:
        for number in range(kills):
            under_way = service.kill_during(KINDS[number % len(KINDS)])
            counts.update([one.partition(" ")[0] for one in under_way] or ["between calls"])
            if say and (number + 1) % 20 == 0:
                print(f"{number + 1} kills, {service.acknowledged} acknowledged, {dict(counts)}", flush=True)
    finally:
        service.stop()
    counts["acknowledged"] = service.acknowledged
    return counts
