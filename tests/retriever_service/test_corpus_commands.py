"""`rag documents` and `rag index`, against a served retriever."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rag_client import index_command
from rag_client.cli import app
from rag_serving.errors import CancelledByCallerError
from retriever_service.corpus.base import Corpus
from retriever_service.corpus.local import LocalCorpus
from retriever_service.milvus.corpus import MilvusCorpus
from tests.retriever_service.servicer_calls import DIM
from tests.retriever_service.tiny_models import make_documents, write_jsonl

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]
Build = Callable[..., Any]
Lines = list[dict[str, Any]]


@contextlib.asynccontextmanager
async def served(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, folder: Path, port: int, **overrides: Any
) -> AsyncIterator[None]:
    monkeypatch.setenv("RAG_CLIENT_RETRIEVER", f"127.0.0.1:{port}")
    monkeypatch.setenv("COLUMNS", "110")
    async with serve(index_folder=folder, grpc_port=port, **overrides):
        yield


async def rag(*words: str, given: bytes | None = None) -> Result:
    """Runs the command beside the event loop that serves."""
    return await asyncio.to_thread(CliRunner().invoke, app, list(words), given)


async def told(*words: str, given: bytes | None = None) -> Any:
    result = await rag(*words, "--json", given=given)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(count: int) -> Lines:
    return [one | {"key": f"new-{number}"} for number, one in enumerate(make_documents(count, DIM))]


def as_jsonl(documents: Lines) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in documents).encode()


async def test_documents_are_upserted_listed_read_and_deleted(
    serve_retriever: Serve, folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = lines(7)
    documents[0]["metadata"] = {"year": 1990}
    file = write_jsonl(tmp_path / "new.jsonl", documents)
    async with served(serve_retriever, monkeypatch, folder, port):
        result = await rag("documents", "upsert", str(file), "--batch-size", "3", "--request-id", "r")
        assert (result.exit_code, result.stdout) == (0, "created 7, replaced 0\n")
        again = await told("documents", "upsert", str(file), "--batch-size", "3", "--request-id", "r")
        assert (again["request_id"], again["created"], again["replaced"]) == ("r", 7, 0)
        assert (await told("index", "show"))["pending_changes"] == again["sequence"] == 7
        over = await told("documents", "upsert", "-", given=as_jsonl(documents[:2]))
        assert (over["created"], over["replaced"]) == (0, 2)

        found = await told("documents", "get", "new-0", "new-6")
        assert [one["title"] for one in found["documents"]] == [documents[0]["title"], documents[6]["title"]]
        assert found["documents"][0]["metadata"] == {"year": 1990}
        result = await rag("documents", "get", "new-0", "nobody", "--row", "999")
        assert result.exit_code == 1
        assert documents[0]["text"][:30] in result.stdout
        assert '{"year": 1990}' in result.stdout
        assert result.stderr == "not there: nobody, row 999\n"

        keys = tmp_path / "keys"
        keys.write_text("\ufeffnew-1\r\nnew-2\n\n")
        gone = await told("documents", "delete", "new-0", "new-1", "nobody", "--file", str(keys))
        assert (gone["deleted"], gone["missing_keys"]) == (3, ["nobody"])
        result = await rag("documents", "delete", "new-3", "nobody")
        assert (result.stdout, result.stderr) == ("deleted 1\n", "not there: nobody\n")
        assert (await told("index", "show"))["ntotal"] == 63


async def test_a_listing_goes_on_by_its_token_and_can_be_written_again(
    serve_retriever: Serve, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch, documents: Lines
) -> None:
    async with served(serve_retriever, monkeypatch, folder, port):
        result = await rag("documents", "list", "--limit", "2")
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) == 3  # with the header
        assert result.stderr.startswith("2 of 60; go on with --page-token ")
        token = result.stderr.split()[-1]
        first = await rag("documents", "list", "--limit", "2", "--json")
        rest = await rag("documents", "list", "--limit", "0", "--json", "--page-token", token)
        assert rest.stderr == ""
        listed = [json.loads(line) for line in (first.stdout + rest.stdout).splitlines()]
        assert sorted(one["key"] for one in listed) == sorted(one["key"] for one in documents)
        embeddings = {one["key"]: one["embedding"] for one in documents}
        changed = [one | {"text": "other", "embedding": embeddings[one["key"]]} for one in listed]
        written = await told("documents", "upsert", "-", given=as_jsonl(changed))
        assert (written["created"], written["replaced"]) == (0, 60)
        stale = await rag("documents", "upsert", "-", given=as_jsonl(changed))  # etags of before
        assert stale.exit_code == 1
        assert stale.stderr.startswith("rag: ABORTED: ")
        assert (await rag("documents", "list", "--page-token", "?")).stderr.startswith("rag: page_token: ")


async def test_what_is_refused_says_what_was_written_and_how_to_go_on(
    serve_retriever: Serve, folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = lines(6)
    file = tmp_path / "new.jsonl.gz"
    file.write_bytes(gzip.compress(as_jsonl(documents[:5]) + b'{"key": "bad"}\n'))
    async with served(serve_retriever, monkeypatch, folder, port):
        flags = ("--batch-size", "2", "--request-id", "r")
        result = await rag("documents", "upsert", str(file), *flags)
        assert result.exit_code == 2
        assert result.stderr.splitlines() == [
            f"rag: {file}, line 6: text is missing",
            "rag: created 4, replaced 0 so far; run again with --request-id r to go on",
        ]
        file.write_bytes(gzip.compress(as_jsonl(documents)))
        assert (await told("documents", "upsert", str(file), *flags))["created"] == 6
        assert (await told("index", "show"))["sequence"] == 6  # nothing was written twice

        result = await rag("documents", "upsert", str(file), "--create-only")
        assert result.exit_code == 1
        assert result.stderr.startswith("rag: ABORTED: ")
        assert "new-0" in result.stderr
        short = as_jsonl([documents[0] | {"embedding": [1.0]}])
        result = await rag("documents", "upsert", "-", given=short)
        assert (result.exit_code, result.stderr.splitlines()[0]) == (
            1,
            f"rag: embeddings: the index has dimension {DIM}, the embeddings have 1",
        )
        bare = as_jsonl([{"key": "a", "text": "b"}])
        result = await rag("documents", "upsert", "-", given=bare)
        assert result.stderr.startswith("rag: FAILED_PRECONDITION: embeddings: give them")


async def test_document_that_the_service_refuses_is_named_by_its_line(
    serve_retriever: Serve, folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`documents[1]` of a batch that nobody has seen helps nobody to find the line."""
    documents = lines(6)
    documents[4]["embedding"] = [0.0] * DIM
    documents[5]["key"] = documents[4]["key"]
    file = write_jsonl(tmp_path / "new.jsonl", documents)
    async with served(serve_retriever, monkeypatch, folder, port):
        result = await rag("documents", "upsert", str(file), "--batch-size", "3")
        assert (result.exit_code, result.stderr.splitlines()[0]) == (
            1,
            f"rag: {file}, line 6: key: is {file}, line 5's already, got 'new-4'",
        )
        write_jsonl(file, documents[:5])
        result = await rag("documents", "upsert", str(file), "--batch-size", "3")
        assert result.stderr.startswith(f"rag: {file}, line 5: embedding: is zero")


async def test_integer_that_no_message_can_hold_is_refused_by_the_client(
    serve_retriever: Serve, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = as_jsonl([lines(1)[0] | {"metadata": {"n": 10**400}}])
    async with served(serve_retriever, monkeypatch, folder, port):
        result = await rag("documents", "upsert", "-", given=huge)
        assert (result.exit_code, result.stderr[:46]) == (2, "rag: the metadata of 'new-0' cannot be sent: i")


async def test_an_index_is_compacted_and_switched(
    serve_retriever: Serve,
    folder: Path,
    port: int,
    tmp_path: Path,
    build_corpus: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_corpus(write_jsonl(tmp_path / "o.jsonl", make_documents(20, DIM)), tmp_path / "other")
    async with served(serve_retriever, monkeypatch, folder, port):
        assert (await rag("index", "operations")).stdout == "no operations\n"
        await told("documents", "upsert", "-", given=as_jsonl(lines(4)))
        shown = await rag("index", "show")
        assert ["pending_changes", "4"] in [line.split() for line in shown.stdout.splitlines()]
        result = await rag("index", "compact")
        assert result.stdout == f"generation 2 serves 64 documents from {folder}\n"
        assert (await told("index", "activate", "other"))["ntotal"] == 20
        assert (await told("index", "activate", "index"))["ntotal"] == 64
        result = await rag("index", "activate", "nothing")
        assert (result.exit_code, result.stderr[:26]) == (1, "rag: FAILED_PRECONDITION: ")
        result = await rag("index", "activate", "../out")
        assert (result.exit_code, result.stderr[:18]) == (1, "rag: index_folder:")
        operations = await told("index", "operations")
        assert [one["done"] for one in operations] == [True] * 4
        assert operations[0]["error"]["code"] == "FAILED_PRECONDITION"
        assert operations[3]["index"]["ntotal"] == 64
        listed = (await rag("index", "operations")).stdout
        assert listed.count(" done ") == 3
        assert (await rag("index", "operations", "--cancel", "operations/none")).stderr.startswith(
            "rag: NOT_FOUND: "
        )


async def test_an_interrupt_cancels_the_operation_and_says_so(
    serve_retriever: Serve, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    def compact(_corpus: Corpus, progress: Any, cancelled: Any) -> None:
        progress("train", 30, 60)
        assert cancelled.wait(60)
        raise CancelledByCallerError("the operation was cancelled")

    async with served(serve_retriever, monkeypatch, folder, port):
        with monkeypatch.context() as patched:
            patched.setattr(LocalCorpus if backend == "local" else MilvusCorpus, "compact", compact)
            name = (await rag("index", "compact", "--no-wait")).stdout.strip()
            running = await told("index", "operations")
            while running[0]["stage"] == "waiting":
                running = await told("index", "operations")
            assert (running[0]["name"], running[0]["done_documents"], running[0]["total_documents"]) == (
                name,
                30,
                60,
            )
            busy = await rag("index", "compact")
            assert (busy.exit_code, name in busy.stderr) == (1, True)
            await told("index", "operations", "--cancel", name)
            while not (await told("index", "operations"))[0]["done"]:
                pass
            assert (await told("index", "operations"))[0]["error"]["code"] == "CANCELLED"

            with monkeypatch.context() as once:

                def sleep(_seconds: float) -> None:
                    once.undo()
                    raise KeyboardInterrupt

                once.setattr(index_command.time, "sleep", sleep)
                result = await rag("index", "compact")
            assert result.exit_code == 1
            assert result.stderr.splitlines()[-1] == "rag: CANCELLED: the operation was cancelled"
            assert "to stop" in result.stderr
        assert (await told("index", "compact"))["generation"] == 2
