"""What is Milvus' own: limits, imports, changes that were half made, the one that writes, and a server that is lost."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving.errors import (
    CancelledByCallerError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    StartupError,
    UnavailableError,
)
from retriever_service.config import RetrieverSettings
from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.errors import CompactionError, DiskFullError, MissingIndexError
from retriever_service.index.manifest import Embedding
from retriever_service.milvus.connection import MilvusAddress, MilvusConnection
from retriever_service.milvus.corpus import MilvusCorpus
from retriever_service.milvus.schema import behind, index_parameters, primary_key
from retriever_service.milvus.state import Change, Checkpoint, State
from retriever_service.types import SearchParameters
from tests.retriever_service.damaged_folders import flip, repaired
from tests.retriever_service.milvus_server import MilvusServer, import_folder, library
from tests.retriever_service.servicer_calls import DIM, request, tensor, violated_fields
from tests.retriever_service.test_corpus import DOCUMENTS, delete, found, keys_of, upsert, vector
from tests.retriever_service.tiny_models import write_jsonl

Build = Callable[..., Any]
Imported = Callable[[Path], str]
QUIET = lambda *_: None  # noqa: E731


@pytest.fixture
def name(tmp_path: Path, corpus: Path, build_corpus: Build, imported: Imported) -> str:
    """A corpus of 60 documents, in Milvus."""
    build_corpus(corpus, tmp_path / "index")
    return imported(tmp_path / "index")


@contextlib.contextmanager
def opened(milvus: MilvusServer, name: str, **options: Any) -> Iterator[MilvusCorpus]:
    with library(milvus.uri, name, **options) as shelf:
        corpus = shelf.active()
        try:
            yield corpus
        finally:
            corpus.close()


def test_primary_keys_have_the_order_of_keys_and_then_of_rows() -> None:
    keys = ["", "\0", "a", "a\0", "a.", "a/", "aa", "b", "é", "中", "\U0001f600"]
    made = [primary_key(key, row) for key in keys for row in (0, 9, 10, 2**40)]
    assert made == sorted(made)
    for one, other in itertools.pairwise(keys):
        assert primary_key(one, 2**62) < behind(one) < primary_key(other, 0)


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        ("Flat", ("FLAT", {})),
        ("HNSW16", ("HNSW", {"M": 16, "efConstruction": 200})),
        ("IVF8,SQ8", ("IVF_SQ8", {"nlist": 8})),
        ("IVF8,PQ4x4", ("IVF_PQ", {"nlist": 8, "m": 4, "nbits": 4})),
        ("IVF8,PQ4", ("IVF_PQ", {"nlist": 8, "m": 4, "nbits": 8})),
    ],
)
def test_kinds_of_faiss_are_index_types_of_milvus(kind: str, index: Any) -> None:
    assert index_parameters(kind) == index
    with pytest.raises(CompactionError, match="cannot be imported"):
        index_parameters(f"OPQ4,{kind}")


def test_a_state_knows_its_rows_after_any_change() -> None:
    state = State.of(Checkpoint(next_row=10, num_documents=10), [])
    written = Change(
        revision=1, sequence=2, num_documents=11, digest="", first_row=15, count=2, void=[(10, 15)]
    )
    state = state.after(written.model_copy(update={"replaced": [3, None]}))
    assert [row for row in range(20) if state.shows(row)] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 15, 16]
    assert state.expression() == "row < 17 and (row < 10 or row >= 15) and row not in [3]"
    assert State.of(state.checkpoint(7), []) == state.without(frozenset({3}), 7)


def test_milvus_needs_its_extra_and_an_address_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:1"):
        MilvusConnection(MilvusAddress("http://127.0.0.1:1", timeout_s=0.5))
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(StartupError, match=r"ragpair\[milvus\]"):
        MilvusConnection(MilvusAddress("http://127.0.0.1:1"))


def test_a_name_that_nobody_imported_is_named(milvus: MilvusServer) -> None:
    with library(milvus.uri, "nothing") as shelf, pytest.raises(MissingIndexError, match="milvus-import"):
        shelf.active()


def test_limits_of_milvus_are_refused_by_field(milvus: MilvusServer, name: str) -> None:
    long = "x" * 65_536
    terms = (
        '{"a": "'
        + "x" * 8000
        + '", "b": "'
        + "x" * 8000
        + '"'
        + "".join(f', "k{place}": "{"y" * 8000}"' for place in range(4))
        + "}"
    )
    wrong = {
        "documents[1].title": NewDocument("b", long, "t"),
        "documents[1].text": NewDocument("b", "", long),
        "documents[1].metadata": NewDocument("b", "", "t", terms),
    }
    with opened(milvus, name) as corpus:
        for field, document in wrong.items():
            batch = Upsert(
                "",
                "d",
                [NewDocument("a", "", "t"), document],
                np.stack([vector(1), vector(2)]),
                False,
                Embedding(name="tiny-encoder"),
            )
            with pytest.raises(InvalidArgumentError, match=r"Milvus keeps at most \d+ bytes") as caught:
                corpus.upsert(batch)
            assert [violation.field for violation in caught.value.violations] == [field]
        assert (corpus.sequence, len(keys_of(corpus))) == (0, 60)


def test_an_import_that_cannot_end_leaves_nothing(
    milvus: MilvusServer, name: str, tmp_path: Path, build_corpus: Build
) -> None:
    long = [{"key": "k", "text": "x" * 70_000, "embedding": [1.0] + [0.0] * (DIM - 1)}]
    build_corpus(write_jsonl(tmp_path / "long.jsonl", long), tmp_path / "long")
    build_corpus(write_jsonl(tmp_path / "pq.jsonl", DOCUMENTS), tmp_path / "pq", kind="PQ4x4")
    cancelled = threading.Event()
    cancelled.set()
    with library(milvus.uri, name) as shelf:
        with pytest.raises(FailedPreconditionError, match=r"document 'k'\.text"):
            shelf.open(tmp_path / "long", 2, [], QUIET, threading.Event())
        with pytest.raises(CompactionError, match="PQ4x4"):
            shelf.open(tmp_path / "pq", 2, [], QUIET, threading.Event())
        build_corpus(write_jsonl(tmp_path / "o.jsonl", DOCUMENTS[:9]), tmp_path / "other")
        with pytest.raises(CancelledByCallerError):
            shelf.open(tmp_path / "other", 2, [], QUIET, cancelled)
        assert shelf.next_number() == 2
        assert not shelf._connection.call("has_collection", f"{name}_2")


def test_a_repaired_folder_that_nobody_has_changed_is_imported(
    milvus: MilvusServer, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """It was refused for want of a changes file."""
    flip(build_corpus(corpus, tmp_path / "index").index_file)
    assert repaired(tmp_path / "index")
    import_folder(milvus.uri, "repaired", tmp_path / "index")
    with opened(milvus, "repaired") as live:
        assert len(keys_of(live)) == len(DOCUMENTS)


def test_changes_that_were_made_in_the_folder_are_imported(
    milvus: MilvusServer, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    from retriever_service.corpus.local import LocalCorpus

    build_corpus(corpus, tmp_path / "index", kind="HNSW8", ef_search=77)
    local = LocalCorpus(tmp_path / "index")
    upsert(local, "fresh", seed=5)
    delete(local, DOCUMENTS[0]["key"])
    local.compact(QUIET, threading.Event())
    upsert(local, "later", seed=6)
    keys = keys_of(local)
    local.close()
    import_folder(milvus.uri, "changed", tmp_path / "index")
    with opened(milvus, "changed") as live:
        assert keys_of(live) == keys
        assert found(live, vector(5) * 10, 1) == ["fresh"]
        assert live._facts.ef_search == 77
        assert list(upsert(live, "next").rows) == [62]


def failing(monkeypatch: pytest.MonkeyPatch, corpus: MilvusCorpus, collection: str, *, before: bool) -> None:
    """Loses the next write to a collection: before it is done, or its answer alone."""
    write = corpus._connection.upsert

    def lost(name: str, entities: Any) -> None:
        if name != collection:
            write(name, entities)
            return
        if not before:
            write(name, entities)
        monkeypatch.undo()
        raise UnavailableError("lost")

    monkeypatch.setattr(corpus._connection, "upsert", lost)


@pytest.mark.parametrize("before", [True, False])
def test_rows_of_a_change_that_failed_are_never_shown_nor_given_again(
    milvus: MilvusServer, name: str, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    with opened(milvus, name) as corpus:
        failing(monkeypatch, corpus, corpus.collection, before=before)
        with pytest.raises(UnavailableError):
            upsert(corpus, "half", seed=1)
        assert "half" not in found(corpus, vector(1) * 10, 61)
        assert list(upsert(corpus, "whole", seed=2).rows) == [61]
        assert "half" not in keys_of(corpus)
        assert "half" not in found(corpus, vector(1) * 10, 61)
    with opened(milvus, name) as corpus:
        assert "half" not in keys_of(corpus)
        assert len(keys_of(corpus)) == corpus.generation.index.ntotal == 61


@pytest.mark.parametrize("before", [True, False])
def test_a_change_whose_answer_was_lost_is_made_once(
    milvus: MilvusServer, name: str, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Whether Milvus wrote the log or not: it is written again before anything else, and a retry is answered."""
    with opened(milvus, name) as corpus:
        failing(monkeypatch, corpus, f"{name}_log", before=before)
        with pytest.raises(UnavailableError, match="request_id"):
            upsert(corpus, "sure", seed=1, request_id="r")
        again = upsert(corpus, "sure", seed=1, request_id="r")
        assert (list(again.rows), again.created, corpus.sequence) == ([60], 1, 1)
        failing(monkeypatch, corpus, f"{name}_log", before=before)
        with pytest.raises(UnavailableError):
            corpus.delete(Delete("", "d", [("sure", "")]))
    with opened(milvus, name) as corpus:
        assert "sure" not in keys_of(corpus)
        assert corpus.sequence == 2


def test_a_writer_that_died_between_rows_and_log_leaves_nothing(
    milvus: MilvusServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(milvus, name) as corpus:
        failing(monkeypatch, corpus, corpus.collection, before=False)
        with pytest.raises(UnavailableError):
            upsert(corpus, "half", seed=1)
        left = corpus._connection.query(corpus.collection, "row >= 60", ["row"])
        assert [one["row"] for one in left] == [60]
    with opened(milvus, name) as corpus:
        assert corpus._connection.query(corpus.collection, "row >= 60", ["row"]) == []
        assert list(upsert(corpus, "next").rows) == [61]
        assert keys_of(corpus) == sorted([*(one["key"] for one in DOCUMENTS), "next"])


def test_what_was_replaced_is_read_for_a_while_and_then_gone(milvus: MilvusServer, name: str) -> None:
    with opened(milvus, name) as corpus:
        victim = DOCUMENTS[7]["key"]
        store = corpus.generation.store
        upsert(corpus, victim, seed=3)
        corpus.follow()
        assert store.documents_by_row([7], replaced=True)[7].key == victim
        assert store.documents_by_row([7]) == {}
        corpus._grace_s = 0.0
        corpus.follow()
        assert store.documents_by_row([7], replaced=True) == {}
        assert len(keys_of(corpus)) == 60
    with opened(milvus, name) as corpus:
        assert (corpus.sequence, len(keys_of(corpus)), list(upsert(corpus, "x").rows)) == (1, 60, [61])


def test_request_ids_are_forgotten_from_the_oldest(milvus: MilvusServer, name: str) -> None:
    with opened(milvus, name, requests_kept=2) as corpus:
        corpus._grace_s = 0.0
        for place in range(4):
            upsert(corpus, f"k{place}", seed=place, request_id=f"r{place}")
        corpus.follow()
        until_s = time.monotonic() + 30
        while corpus._log.find(corpus.collection, "r0") is not None and time.monotonic() < until_s:
            time.sleep(0.05)
        assert list(upsert(corpus, "k3", seed=3, request_id="r3").rows) == [63]
        assert list(upsert(corpus, "k0", seed=0, request_id="r0").rows) == [64]
    with opened(milvus, name) as corpus:
        assert len(keys_of(corpus)) == 64


def test_a_second_writer_waits_for_the_dead_and_gives_way_to_the_living(
    milvus: MilvusServer, name: str
) -> None:
    with opened(milvus, name) as writer:
        with opened(milvus, name) as other:
            assert "writes to it" in str(other.read_only_reason)
            upsert(writer, "fresh", seed=4)
            assert other.follow()
            assert found(other, vector(4) * 10, 1) == ["fresh"]
        log = writer._log
        log.set_owner({"holder": "another", "beat": 1})
        until_s = time.monotonic() + 30
        while writer.read_only_reason is None and time.monotonic() < until_s:
            time.sleep(0.05)
        with pytest.raises(FailedPreconditionError, match="another"):
            upsert(writer, "too late")
    with opened(milvus, name) as heir:
        assert heir.read_only_reason is None
        upsert(heir, "later")


def test_a_writer_whose_sign_is_gone_writes_again_once_nobody_else_does(
    milvus: MilvusServer, name: str
) -> None:
    with opened(milvus, name) as writer:
        upsert(writer, "before", seed=4)
        writer._log.clear_owner()
        until_s = time.monotonic() + 30
        while writer.read_only_reason is None and time.monotonic() < until_s:
            time.sleep(0.05)
        with pytest.raises(FailedPreconditionError, match="unknown"):
            upsert(writer, "too soon")
        # What another wrote meanwhile is seen before anything else is written.
        with opened(milvus, name) as other:
            upsert(other, "meanwhile", seed=5)
            writer.follow()
            assert writer.read_only_reason is not None
        writer.follow()
        assert writer.read_only_reason is None
        assert list(upsert(writer, "after", seed=6).rows) == [62]
        assert {"before", "meanwhile", "after"} < set(keys_of(writer))
    with opened(milvus, name) as heir:
        assert heir.read_only_reason is None


@pytest.mark.parametrize("dies", [False, True])
def test_a_reader_takes_over_from_a_writer_that_is_gone(
    milvus: MilvusServer, name: str, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(opened(milvus, name))
        victim = DOCUMENTS[5]["key"]
        upsert(writer, victim, seed=8)
        failing(monkeypatch, writer, writer.collection, before=False)
        with pytest.raises(UnavailableError):
            upsert(writer, "half", seed=1)
        heir = stack.enter_context(opened(milvus, name))
        assert heir.read_only_reason is not None
        heir.follow()
        writer.close()
        if dies:
            writer._log.set_owner({"holder": "the dead", "beat": 7})
            assert not heir.follow()
            assert heir.read_only_reason is not None
        until_s = time.monotonic() + 30
        while heir.read_only_reason is not None and time.monotonic() < until_s:
            heir.follow()
            time.sleep(0.05)
        assert list(upsert(heir, "next", seed=3).rows) == [62]
        heir._grace_s = 0.0
        heir.follow()
        assert heir.generation.store.documents_by_row([5], replaced=True) == {}
        assert keys_of(heir) == sorted([*(one["key"] for one in DOCUMENTS), "next"])


def test_a_reader_moves_to_what_was_compacted_and_activated_before_it_takes_over(
    milvus: MilvusServer, name: str, tmp_path: Path, build_corpus: Build
) -> None:
    """It would have gone on with a collection that the alias names no more: its changes served nobody."""
    build_corpus(write_jsonl(tmp_path / "o.jsonl", DOCUMENTS[:9]), tmp_path / "other")
    with contextlib.ExitStack() as stack:
        shelf = stack.enter_context(library(milvus.uri, name))
        writer = shelf.active()
        stack.callback(writer.close)
        reading = stack.enter_context(library(milvus.uri, name))
        reader = reading.active()
        stack.callback(reader.close)
        assert reading.newer(reader.generation, [reader]) is None
        compacted = writer.compact(QUIET, threading.Event())
        assert reading.newer(reader.generation, [reader]) == (reader, reader.adopt(compacted.number))
        assert reading.newer(reader.generation, [reader]) is None
        other, generation = shelf.open(tmp_path / "other", 3, [writer], QUIET, threading.Event())
        stack.callback(other.close)
        shelf.remember(other, generation)
        writer.close()
        other.close()
        reader.follow()
        assert reader.read_only_reason is not None, "took over a collection that serves no more"
        found_newer = reading.newer(reader.generation, [reader])
        assert found_newer is not None
        heir, moved = found_newer
        stack.callback(heir.close)
        assert (moved.number, moved.index.ntotal, heir.read_only_reason) == (3, 9, None)
        upsert(heir, "fresh", seed=4)
    with opened(milvus, name) as corpus:
        assert "fresh" in keys_of(corpus)


def test_the_number_of_an_activation_that_was_given_up_is_not_given_again(
    milvus: MilvusServer, name: str, tmp_path: Path, build_corpus: Build
) -> None:
    """A follower had seen it, and would have gone on to no other collection under it."""
    build_corpus(write_jsonl(tmp_path / "o.jsonl", DOCUMENTS[:9]), tmp_path / "other")
    never = threading.Event()
    with library(milvus.uri, name) as shelf, library(milvus.uri, name, take_changes=False) as reading:
        writer, reader = shelf.active(), reading.active()
        given_up, generation = shelf.open(writer.folder, 2, [writer], QUIET, never)
        assert (given_up, generation.number) == (writer, 2)
        assert reading.newer(reader.generation, [reader]) == (reader, reader.adopt(2))
        other, generation = shelf.open(tmp_path / "other", 2, [writer], QUIET, never)
        assert generation.number == 3
        shelf.remember(other, generation)
        found_newer = reading.newer(reader.generation, [reader])
        assert found_newer is not None
        assert (found_newer[1].number, found_newer[1].index.ntotal) == (3, 9)
        for corpus in (found_newer[0], other, reader, writer):
            corpus.close()


async def test_a_lost_milvus_is_unavailable_and_found_again(
    tmp_path_factory: pytest.TempPathFactory,
    milvus_engine: Callable[[Path], MilvusServer],
    index_folder: Path,
    checkpoint: Path,
) -> None:
    """The whole service, in a process: its health follows Milvus, and no restart is needed."""
    import json

    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from rag.retriever.v1 import retriever_service_pb2_grpc

    server = milvus_engine(tmp_path_factory.mktemp("lost"))
    server.start()
    import_folder(server.uri, "lost", index_folder)
    command = [
        *(sys.executable, "-W", "error", "-m", "retriever_service.main", "--backend", "milvus"),
        *("--milvus-uri", server.uri, "--milvus-collection", "lost", "--milvus-timeout-s", "2"),
        *("--milvus-lease-s", "2", "--generator-checkpoint", str(checkpoint), "--follow-interval-s", "0.1"),
        *("--grpc-port", "0", "--http-port", "0", "--log-format", "json", "--shutdown-delay-s", "0"),
    ]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        address = ""
        async for line in process.stderr:
            record = json.loads(line)
            address = record.get("grpc", address)
            if record["message"] == "serving":
                break
        async with grpc.aio.insecure_channel(address) as channel:
            stub = retriever_service_pb2_grpc.RetrieverServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            asked = health_pb2.HealthCheckRequest(service="rag.retriever.v1.RetrieverService")

            async def becomes(status: int) -> None:
                while True:
                    if (await health.Check(asked)).status == status:
                        return
                    await asyncio.sleep(0.05)

            answer = await stub.Retrieve(request(n_docs=2))
            await becomes(health_pb2.HealthCheckResponse.SERVING)
            server.stop()
            batch = retriever_service_pb2.UpsertDocumentsRequest(
                documents=[document_pb2.Document(key="a", text="t")], embeddings=tensor(vector(1)[None])
            )
            for call in (stub.Retrieve(request(n_docs=2)), stub.UpsertDocuments(iter([batch])).read()):
                with pytest.raises(grpc.aio.AioRpcError, match="Milvus at") as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            await becomes(health_pb2.HealthCheckResponse.NOT_SERVING)
            server.start()
            await becomes(health_pb2.HealthCheckResponse.SERVING)
            assert await stub.Retrieve(request(n_docs=2)) == answer
            assert (await stub.UpsertDocuments(iter([batch])).read()).created == 1
            long = document_pb2.Document(key="a", text="x" * 65_536)
            del batch.documents[:]
            batch.documents.append(long)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UpsertDocuments(iter([batch])).read()
            assert violated_fields(caught.value) == ["documents[0].text"]
        process.terminate()
        await process.stderr.read()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        server.stop()


def test_errors_of_milvus_are_told_apart(milvus: MilvusServer) -> None:
    connection = MilvusConnection(MilvusAddress(milvus.uri))
    for code, kind in ((8, DiskFullError), (2, UnavailableError), (65_535, UnavailableError)):
        error = Exception("said")
        error.code = code  # type: ignore[attr-defined]
        assert type(connection._meaning(error)) is kind
    connection.close()


def test_a_collection_is_gone_only_where_milvus_has_none_when_asked_again(
    milvus: MilvusServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of Milvus have been seen to say that a collection is not found which was there before and after."""

    def not_found(*_: Any, **__: Any) -> None:
        error = Exception("collection not found")
        error.code = 100  # type: ignore[attr-defined]
        raise error

    connection = MilvusConnection(MilvusAddress(milvus.uri))
    monkeypatch.setattr(connection._client, "query", not_found)
    with pytest.raises(UnavailableError, match="not found"):
        connection.query(f"{name}_log", "number == 0", ["id"])
    with pytest.raises(DataLossError, match="not found"):
        connection.query(f"{name}_none", "number == 0", ["id"])
    connection.close()


def test_command_imports_a_folder_that_a_retriever_then_serves(
    milvus: MilvusServer, index_folder: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("root:Milvus\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "retriever_service.ingest.cli", "milvus-import", str(index_folder)),
            *(
                "--milvus-uri",
                milvus.uri,
                "--milvus-collection",
                "commanded",
                "--milvus-token-file",
                str(token),
            ),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "generation 1, 60 documents" in done.stderr
    with opened(milvus, "commanded") as corpus:
        rows, _ = corpus.generation.index.search(vector(1)[None], 3, SearchParameters())
        assert rows.shape == (1, 3)
        busy = subprocess.run(done.args, capture_output=True, text=True, check=False)
        assert busy.returncode == 1
        assert "writes to it" in busy.stderr


def test_settings_say_what_a_backend_needs(checkpoint: Path) -> None:
    given = {"generator_checkpoint": str(checkpoint)}
    with pytest.raises(ValueError, match="index_folder is required"):
        RetrieverSettings.model_validate(given)
    with pytest.raises(ValueError, match="above 4000"):
        RetrieverSettings.model_validate(given | {"backend": "milvus", "max_change_documents": 4001})
    settings = RetrieverSettings.model_validate(given | {"backend": "milvus", "milvus_token": "secret"})
    assert "secret" not in repr(settings)
