"""A real worker process over a tiny checkpoint: start, answer, abort, die, come back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from generator_service.engine.async_engine import AsyncEngine, gather_or_cancel
from generator_service.engine.messages import Generated, Progress
from generator_service.engine.worker_options import WorkerOptions
from generator_service.errors import QueueFullError, WorkerLostError
from generator_service.types import ModelSource, Pooling, Strategy
from rag_serving.errors import InvalidArgumentError, StartupError
from tests.generator_service.engine.test_engine_core import work
from tests.parity.tiny_models import tiny_rag


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    tiny_rag("bart").generator.save_pretrained(folder)
    return folder


def options(folder: Path, **changes: object) -> WorkerOptions:
    source = ModelSource(
        rag_checkpoint=None,
        question_encoder=None,
        generator=str(folder),
        pooling=Pooling.FIRST_OUTPUT,
        normalize=False,
        score_scale=1.0,
        dtype="float32",
    )
    made = WorkerOptions(
        device="cpu",
        source=source,
        threads=1,
        cache_budget_bytes=10**8,
        max_rows=256,
        max_context_tokens=4096,
        heartbeat_s=0.2,
        log_level="warning",
        log_format="text",
    )
    return msgspec.structs.replace(made, **changes)


def engine(*made: WorkerOptions, **changes: object) -> AsyncEngine:
    arguments = {"heartbeat_timeout_s": 60.0, "max_queued": 100, **changes}
    return AsyncEngine(made, **arguments)  # type: ignore[arg-type]


async def test_worker_answers_aborts_dies_and_comes_back(generator_folder: Path) -> None:
    changes: list[int] = []
    running = engine(options(generator_folder), on_change=lambda: changes.append(running.num_ready))
    ready = await running.start()
    try:
        assert ready.decoder == "bart"
        assert ready.question_max_length == 0
        first = await running.generate(work(0))
        crowd = await gather_or_cancel([running.generate(work(0)) for _ in range(5)])
        assert all(r.hypotheses[0].token_ids == first.hypotheses[0].token_ids for r in crowd)

        slow = msgspec.structs.replace(work(0).settings, max_length=60, num_beams=8, min_length=60)
        cancelled = asyncio.ensure_future(running.generate(work(0, settings=slow)))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert running.num_pending == 0
        assert (await running.generate(work(0))).hypotheses == first.hypotheses

        process = running.workers[0]._process
        assert process is not None
        doomed = asyncio.ensure_future(running.generate(work(0, settings=slow)))
        await asyncio.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError):
            await doomed
        while running.num_ready == 0:  # noqa: ASYNC110  (the worker has no event for it)
            await asyncio.sleep(0.05)
        assert running.workers[0].restarts == 1
        assert (await running.generate(work(0))).hypotheses == first.hypotheses
        assert changes == [1, 0, 1]
    finally:
        await running.stop()
    assert running.workers[0]._process is None


async def test_the_questions_of_a_worker_that_dies_are_answered_by_another_once(
    generator_folder: Path,
) -> None:
    one, other = options(generator_folder), options(generator_folder)
    running = engine(one, other)
    await running.start()
    try:
        long = msgspec.structs.replace(work(0).settings, max_length=60, num_beams=8, min_length=60)
        expected = await running.generate(work(0, settings=long))
        doomed = [asyncio.ensure_future(running.generate(work(0, settings=long))) for _ in range(8)]
        await asyncio.sleep(0.02)
        first, second = (worker._process for worker in running.workers)
        assert first is not None
        assert second is not None
        os.kill(first.pid, signal.SIGKILL)
        for report in await asyncio.gather(*doomed):
            assert report.hypotheses[0].token_ids == expected.hypotheses[0].token_ids
        assert 0 < running.num_retried <= 8
        os.kill(second.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
        lost = asyncio.ensure_future(running.workers[1].submit(work(10**6)))
        await asyncio.sleep(0.02)
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError):
            await lost
    finally:
        await running.stop()


async def test_a_question_of_which_a_piece_is_out_is_not_begun_again_by_another_worker(
    tmp_path: Path,
) -> None:
    """The caller has it, and a second beginning, sampled or on another device, might go on otherwise."""
    answer = Generated(request_id=1, hypotheses=[], queue_s=0.0, first_token_s=0.0, generate_s=0.0)
    piece = Progress(request_id=1, token_ids=[5], document_posterior=[[1.0]], last=False)

    class Dying:
        ready, num_pending, device = True, 0, "cpu"

        def __init__(self, pieces: int) -> None:
            self.pieces = pieces

        def next_id(self) -> int:
            return 1

        async def submit(self, work: object, on_progress: Callable[[Progress], None]) -> Generated:
            for _ in range(self.pieces):
                on_progress(piece)
            raise WorkerLostError(self.device)

    class Living(Dying):
        num_pending = 1

        async def submit(self, work: object, on_progress: Callable[[Progress], None]) -> Generated:
            return answer

    for pieces in (0, 1):
        running = engine(options(tmp_path), options(tmp_path))
        running.workers = [Dying(pieces), Living(0)]  # type: ignore[list-item]
        seen: list[Progress] = []
        asked = running.generate(work(0, stream=True), seen.append)
        if pieces:
            with pytest.raises(WorkerLostError):
                await asked
        else:
            assert await asked is answer
        assert (len(seen), running.num_retried) == (pieces, 1 - pieces)


async def test_the_questions_of_the_only_worker_fail_with_a_wait_and_are_not_begun_again(
    generator_folder: Path,
) -> None:
    """It starts for many seconds, longer than most callers wait: they are told, and may come again."""
    running = engine(options(generator_folder), max_queued=5)
    await running.start()
    try:
        process = running.workers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
        with running.accepted(4):
            doomed = [asyncio.ensure_future(running.generate(work(0))) for _ in range(4)]
            while running.num_pending < 4:  # noqa: ASYNC110  (sending has no event)
                await asyncio.sleep(0)
            os.kill(process.pid, signal.SIGKILL)
            for error in await asyncio.gather(*doomed, return_exceptions=True):
                assert isinstance(error, WorkerLostError)
                assert (error.status, error.retry_after_s) == ("UNAVAILABLE", 2.0)
        with pytest.raises(WorkerLostError):  # also what comes while it starts
            await running.generate(work(0))
        assert (running.num_retried, running.num_pending) == (0, 0)
        while running.num_ready == 0:  # noqa: ASYNC110  (the worker has no event for it)
            await asyncio.sleep(0.05)
        with running.accepted(5):
            assert (await running.generate(work(0))).hypotheses
    finally:
        await running.stop()


async def test_workers_killed_at_any_moment_lose_no_reply(generator_folder: Path) -> None:
    """Every question is answered, rightly, or fails with UNAVAILABLE: whenever a worker dies, starting or working."""
    running = engine(options(generator_folder), options(generator_folder))
    await running.start()
    rng, works = random.Random(7), [work(0), work(0, strategy=Strategy.RAG_TOKEN)]
    try:
        expected = [(await running.generate(one)).hypotheses[0].token_ids for one in works]
        counts = {"answered": 0, "unavailable": 0}
        stop = asyncio.Event()

        async def ask(kind: int) -> None:
            while not stop.is_set():
                try:
                    report = await asyncio.wait_for(running.generate(works[kind]), 60)
                except WorkerLostError:
                    counts["unavailable"] += 1
                    await asyncio.sleep(0.02)
                else:
                    assert report.hypotheses[0].token_ids == expected[kind]
                    counts["answered"] += 1

        asking = [asyncio.ensure_future(ask(number % 2)) for number in range(12)]
        for _ in range(6):
            await asyncio.sleep(rng.uniform(0.05, 0.6))
            process = rng.choice(running.workers)._process
            if process is not None and process.returncode is None:
                process.kill()
        while running.num_ready == 0:  # noqa: ASYNC110  (the workers have no event for it)
            await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*asking)
        assert counts["answered"] > 0
        assert running.num_pending == 0
        with running.accepted(100):
            pass
    finally:
        await running.stop()


async def test_a_silent_worker_is_killed(generator_folder: Path) -> None:
    running = engine(options(generator_folder), heartbeat_timeout_s=1.0)
    await running.start()
    try:
        process = running.workers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerLostError):
            await running.generate(work(0))
    finally:
        await running.stop()


async def test_refusals_name_their_cause(generator_folder: Path) -> None:
    running = engine(options(generator_folder, cache_budget_bytes=200_000), max_queued=1)
    await running.start()
    try:
        with pytest.raises(InvalidArgumentError, match="bytes of cache"):
            await running.generate(work(0, contexts=[[5] * 60] * 90, doc_scores=[0.0] * 90))
        with running.accepted(1), pytest.raises(QueueFullError, match="takes 1: no room for 1 more") as full:
            running.accepted(1).__enter__()
        assert full.value.retry_after_s == 1.0, "nothing was answered yet"
        with pytest.raises(QueueFullError, match="no room for 2 more"), running.accepted(2):
            pass
        with running.accepted(1):
            pass
    finally:
        await running.stop()


async def test_a_folder_without_a_model_is_a_startup_error(tmp_path: Path) -> None:
    running = engine(options(tmp_path))
    with pytest.raises(StartupError, match="cannot start"):
        await running.start()
    await running.stop()
