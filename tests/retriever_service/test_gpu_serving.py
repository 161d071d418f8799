"""A retriever whose index is on GPUs, which here are played: changes, filters and swaps over the wire."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rag.retriever.v1 import retriever_service_pb2
from rag_client.filters import metadata_filter
from retriever_service.config import RetrieverSettings
from tests.retriever_service.fake_gpus import FakeGpus
from tests.retriever_service.servicer_calls import DIM, tensor

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


@pytest.fixture
def backend() -> str:
    return "local"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    return FakeGpus().install(monkeypatch)


def questions(seed: int, batch: int = 1) -> Any:
    return tensor(np.random.default_rng(seed).standard_normal((batch, DIM)).astype(np.float32))


async def keys_found(stub: Any, seed: int, **fields: Any) -> list[str]:
    asked = retriever_service_pb2.RetrieveRequest(
        question_hidden_states=questions(seed),
        n_docs=5,
        skip_contexts=True,
        include_documents=True,
        **fields,
    )
    return [document.key for document in (await stub.Retrieve(asked)).documents]


async def described(stub: Any) -> Any:
    return await stub.GetIndex(retriever_service_pb2.GetIndexRequest())


async def ended(stub: Any, operation: Any) -> Any:
    while not operation.done:
        await asyncio.sleep(0.01)
        answer = await stub.GetOperation(retriever_service_pb2.GetOperationRequest(name=operation.name))
        operation = answer.operation
    return operation


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (threads have no event to wait for)
        await asyncio.sleep(0.01)


def labelled(metrics: Any, name: str, label: str) -> dict[str, float]:
    return {
        sample.labels[label]: sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == f"rag_retriever_{name}"
    }


def devices_in(metrics: Any) -> dict[str, float]:
    return labelled(metrics, "index_device", "device")


def fallbacks_in(metrics: Any) -> dict[str, float]:
    return labelled(metrics, "index_fallback", "reason")


async def test_answers_from_gpus_are_those_of_the_cpu_filtered_or_not(
    serve_retriever: Serve, folder: Path, gpus: FakeGpus
) -> None:
    conditions = [None, metadata_filter({"language": "en"})]
    answers = []
    for devices in ("", "0,1"):
        async with serve_retriever(
            index_folder=folder, index_devices=devices, max_exact_rows=0, read_only=True
        ) as (_, stub, metrics):
            expected = ["cuda:0", "cuda:1"] if devices else ["cpu"]
            assert list((await described(stub)).devices) == expected
            assert devices_in(metrics) == dict.fromkeys(expected, 1.0)
            before = len(gpus.searches)
            answers.append(
                [await keys_found(stub, seed, filter=one) for seed in range(5) for one in conditions]
            )
            assert len(gpus.searches) - before == (5 if devices else 0)
            assert not fallbacks_in(metrics)
            filtered = {"selection": 5.0} if devices else {}
            assert labelled(metrics, "search_fallbacks_total", "reason") == filtered
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
    assert gpus.on_device == {0: 0, 1: 0}


async def test_batches_that_come_at_once_are_spread_over_the_gpus(
    serve_retriever: Serve, folder: Path, gpus: FakeGpus
) -> None:
    async with serve_retriever(index_folder=folder, index_devices="all", max_search_batch=1) as (_, stub, _):
        before = len(gpus.searches)
        # A search ends once there is one on the other GPU.
        gpus.meeting = threading.Barrier(2)
        await asyncio.gather(*(keys_found(stub, seed) for seed in range(8)))
        gpus.meeting = None
        found = gpus.searches[before:]
    assert sorted(one.device for one in found) == [0] * 4 + [1] * 4
    assert [len(gpus.threads[number]) for number in (0, 1)] == [1, 1]


async def test_changes_are_seen_and_a_compaction_frees_the_index_of_before(
    serve_retriever: Serve, folder: Path, gpus: FakeGpus
) -> None:
    async with serve_retriever(index_folder=folder, index_devices="0", generations_kept=1) as (
        _,
        stub,
        metrics,
    ):
        first, *others = await keys_found(stub, 3)
        await stub.DeleteDocuments(
            retriever_service_pb2.DeleteDocumentsRequest(
                documents=[retriever_service_pb2.DocumentReference(key=first)]
            )
        )
        before = len(gpus.searches)
        assert (await keys_found(stub, 3))[:4] == others
        assert len(gpus.searches) == before + 1
        assert gpus.on_device == {0: 60}
        begun = await stub.CompactIndex(retriever_service_pb2.CompactIndexRequest())
        operation = await ended(stub, begun.operation)
        assert operation.WhichOneof("result") != "error"
        await until(lambda: gpus.on_device[0] == 59)
        assert (await keys_found(stub, 3))[:4] == others
        assert devices_in(metrics) == {"cuda:0": 1.0}
    assert gpus.on_device == {0: 0}
    assert len(gpus.threads[0]) == 1


async def test_index_without_room_beside_the_one_of_before_moves_once_that_is_gone(
    serve_retriever: Serve, folder: Path, gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.vectors_that_fit = 100
    async with serve_retriever(index_folder=folder, index_devices="0", generations_kept=1) as (
        _,
        stub,
        metrics,
    ):
        begun = await stub.CompactIndex(retriever_service_pb2.CompactIndexRequest())
        await ended(stub, begun.operation)
        assert (await described(stub)).generation == 2
        await until(lambda: devices_in(metrics) == {"cuda:0": 1.0})
        assert not fallbacks_in(metrics)
        assert "the index stays on the CPU: kind Flat: cuda:0: " in caplog.text
        before = len(gpus.searches)
        await keys_found(stub, 3)
        assert len(gpus.searches) == before + 1


async def test_mapped_index_stays_on_the_cpu_and_one_line_says_why(
    serve_retriever: Serve, folder: Path, gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with serve_retriever(index_folder=folder, index_devices="0", memory_map=True) as (
            _,
            stub,
            metrics,
        ):
            assert list((await described(stub)).devices) == ["cpu"]
            assert fallbacks_in(metrics) == {"memory_map": 1.0}
    assert caplog.text.count("indexes stay on the CPU: --memory-map") == 1


@pytest.mark.parametrize(
    ("of_gpus", "devices", "reason"),
    [
        ({"num_gpus": 0}, "all", "no_gpu"),
        ({}, "7", "no_gpu"),
        ({"vectors_that_fit": 59}, "0", "copy_failed"),
        ({}, "", None),
    ],
)
async def test_metric_says_why_an_index_for_gpus_is_on_the_cpu(
    serve_retriever: Serve,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_gpus: dict[str, int],
    devices: str,
    reason: str | None,
) -> None:
    FakeGpus(**of_gpus).install(monkeypatch)
    async with serve_retriever(index_folder=folder, index_devices=devices) as (_, stub, metrics):
        assert list((await described(stub)).devices) == ["cpu"]
        assert fallbacks_in(metrics) == ({} if reason is None else {reason: 1.0})
        await keys_found(stub, 3)
        # The index's fallback says it already: not each search again.
        assert not labelled(metrics, "search_fallbacks_total", "reason")


async def test_metric_names_a_kind_that_faiss_lacks_on_gpus(
    serve_retriever: Serve, tmp_path: Path, corpus: Path, build_corpus: Callable[..., Any], gpus: FakeGpus
) -> None:
    build_corpus(corpus, tmp_path / "index", kind="HNSW8")
    async with serve_retriever(index_folder=tmp_path / "index", index_devices="0") as (_, _stub, metrics):
        assert fallbacks_in(metrics) == {"kind": 1.0}


@pytest.mark.parametrize("devices", ["cuda", "0,", "gpu:0", "-1", "0 1"])
def test_devices_that_name_no_gpus_are_refused(folder: Path, devices: str) -> None:
    with pytest.raises(ValidationError, match="index_devices"):
        RetrieverSettings.model_validate(
            {"index_folder": folder, "generator_checkpoint": "x", "index_devices": devices}
        )
