"""A client that changes documents of its own without pause, and remembers what was acknowledged."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving import tensor_codec
from tests.faults.changing_corpus import vector_of

Texts = dict[str, str]
_NUM_KEYS = 40
_LARGEST_BATCH = 8
_MOST_BATCHES = 5
MAX_N_DOCS = 100


class ServiceWriter:
    """Streams upserts, and deletes, of keys that nobody else changes; `texts` by folder is what must be there."""

    def __init__(self, name: str, seed: int, built: dict[str, Texts]) -> None:
        self.name = name
        self.texts: dict[str, Texts] = {folder: dict(texts) for folder, texts in built.items()}
        self.gone: list[str] = []
        self.pending: list[Any] = []
        self.acknowledged = 0
        self.sequence = 0
        self.busy = threading.Lock()
        self._last: dict[str, tuple[Any, Any]] = {}
        self._random = random.Random(seed)
        self._count = 0
        self._keys = [f"{name}-{number}" for number in range(_NUM_KEYS)]

    def change(self, stub: Any, folder: str, begun: Callable[[str], None]) -> None:
        """Makes one call and looks whether searches see it. Raises grpc.RpcError, AssertionError."""
        if self._random.random() < 0.65:
            self.pending = [self.upsert() for _ in range(self._random.randint(1, _MOST_BATCHES))]
        else:
            self.pending = [self.delete()]
        begun(kind_of(self.pending[0]))
        changed = {key for request in self.pending for key in _keys_of(request)}
        for response in send(stub, list(self.pending)):
            self._acknowledge(folder, response)
        vector = vector_of(self._random.choice(self.gone or ["none yet"]))
        found = search(stub, np.stack([vector]))[0]
        wanted = {key: self.texts[folder][key] for key in changed if key in self.texts[folder]}
        assert {key: found[key] for key in changed if key in found}.items() <= wanted.items(), (
            "a search after the acknowledgement does not see the change"
        )

    def settle(self, stub: Any, folder: str, found: Texts) -> None:
        """After a restart: what was under way is there up to one of its batches; sent again, it is done once."""
        mine = {key: text for key, text in found.items() if key.startswith(f"{self.name}-")}
        states = [dict(self.texts[folder])]
        for request in self.pending:
            states.append(_after(states[-1], request))
        assert mine in states, f"{self.name}: acknowledged and lost, deleted and back, or half a batch"
        if folder in self._last:
            request, first = self._last[folder]
            (again,) = send(stub, [request])
            assert again == first, "a request_id that was acknowledged was done twice"
        while self.pending:
            same_kind = [one for one in self.pending if kind_of(one) == kind_of(self.pending[0])]
            for response in send(stub, same_kind):
                self._acknowledge(folder, response)

    def _acknowledge(self, folder: str, response: Any) -> None:
        request = self.pending.pop(0)
        assert response.request_id == request.request_id
        before = self.texts[folder]
        self.gone += [before[key] for key in _keys_of(request) if key in before]
        del self.gone[:-50]
        self.texts[folder] = _after(before, request)
        self._last[folder] = request, response
        self.sequence = max(self.sequence, response.sequence)
        self.acknowledged += 1

    def upsert(self) -> Any:
        """Makes a batch of some of its keys."""
        request_id = self._request_id()
        texts = {key: f"{key} of {request_id}" for key in self._some_keys()}
        return retriever_service_pb2.UpsertDocumentsRequest(
            request_id=request_id,
            documents=[document_pb2.Document(key=key, text=text) for key, text in texts.items()],
            embeddings=tensor_codec.encode(np.stack([vector_of(text) for text in texts.values()])),
        )

    def delete(self) -> Any:
        """Makes a delete of some of its keys."""
        references = [retriever_service_pb2.DocumentReference(key=key) for key in self._some_keys()]
        return retriever_service_pb2.DeleteDocumentsRequest(
            request_id=self._request_id(), documents=references
        )

    def _some_keys(self) -> list[str]:
        return self._random.sample(self._keys, self._random.randint(1, _LARGEST_BATCH))

    def _request_id(self) -> str:
        self._count += 1
        return f"{self.name} {self._count}"


def kind_of(request: Any) -> str:
    """Returns "upsert" or "delete"."""
    is_upsert = isinstance(request, retriever_service_pb2.UpsertDocumentsRequest)
    return "upsert" if is_upsert else "delete"


def send(stub: Any, requests: list[Any]) -> Iterator[Any]:
    """Sends requests of one kind, upserts in one stream; yields their answers. Raises grpc.RpcError."""
    if kind_of(requests[0]) == "upsert":
        yield from stub.UpsertDocuments(iter(requests))
    else:
        for request in requests:
            yield stub.DeleteDocuments(request)


def listed(stub: Any) -> Texts:
    """Reads the texts of all documents by key, page by page."""
    texts: Texts = {}
    token = ""
    while True:
        asked = retriever_service_pb2.ListDocumentsRequest(page_size=50, page_token=token)
        page = stub.ListDocuments(asked)
        texts |= {document.key: document.text for document in page.documents}
        token = page.next_page_token
        if not token:
            return texts


def search(stub: Any, vectors: Any) -> list[Texts]:
    """Returns texts by key of all documents found for each of vectors float32 [questions, dim]."""
    answer = stub.Retrieve(
        retriever_service_pb2.RetrieveRequest(
            question_hidden_states=tensor_codec.encode(vectors),
            n_docs=MAX_N_DOCS,
            skip_contexts=True,
            include_documents=True,
        )
    )
    found: list[Texts] = []
    for question, count in enumerate(answer.n_docs_found):
        first = question * answer.n_docs
        documents = answer.documents[first : first + count]
        found.append({document.key: document.text for document in documents})
        assert len(found[-1]) == count, "a document is found twice"
    return found


def _keys_of(request: Any) -> list[str]:
    return [document.key for document in request.documents]


def _after(texts: Texts, request: Any) -> Texts:
    """Returns what is there after a change."""
    changed = dict(texts)
    for document in request.documents:
        if kind_of(request) == "upsert":
            changed[document.key] = document.text
        else:
            changed.pop(document.key, None)
    return changed


def is_lost(error: grpc.RpcError) -> bool:
    """Whether a call ended because the service did."""
    return error.code() is grpc.StatusCode.UNAVAILABLE
