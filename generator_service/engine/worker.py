"""The service's side of a worker process: spawn, watch its heartbeat, restart; one future a request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable

from generator_service.engine import messages
from generator_service.engine.frames import read_frame, write_frame
from generator_service.engine.messages import (
    Abort,
    Failed,
    Progress,
    Ready,
    Report,
    Shutdown,
    StartFailed,
    Stats,
    Work,
)
from generator_service.engine.pass_messages import ReleasePast
from generator_service.engine.worker_options import WorkerOptions
from generator_service.errors import WorkerLostError, error_of
from rag_serving.errors import StartupError

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

_GOODBYE_S = 5.0
_RESTART_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)


class Worker:
    """One device. on_change is told when the worker becomes usable or stops being so."""

    def __init__(
        self, options: WorkerOptions, *, heartbeat_timeout_s: float, on_change: Callable[[], None]
    ) -> None:
        self._options = options
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_change = on_change
        self._pending: dict[int, asyncio.Future[Report]] = {}
        self._listeners: dict[int, OnProgress] = {}
        self._ids = itertools.count(1)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self._heard_s = 0.0
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.restarts = 0

    @property
    def device(self) -> str:
        """The device's name, as torch has it."""
        return self._options.device

    @property
    def num_pending(self) -> int:
        """Requests sent and not answered yet."""
        return len(self._pending)

    def next_id(self) -> int:
        """A number for the next request to this worker."""
        return next(self._ids)

    async def start(self) -> Ready:
        """Start the process and wait until its models are warm. Raises StartupError with its reason."""
        reader = await self._spawn()
        ready = await self._first_report(reader)
        if isinstance(ready, StartFailed):
            await self._reap()
            raise StartupError(f"the worker on {self.device} cannot start: {ready.message}")
        self._supervisor = asyncio.create_task(self._supervise(reader))
        return ready

    async def submit(self, work: Work | ReleasePast, on_progress: OnProgress | None = None) -> Report:
        """Send a request and wait for its answer; cancelling the wait aborts it in the worker.

        on_progress is told what is certain on the way there; it must not block.
        Raises RagError's subclasses: what the worker said, or WorkerLostError where it died.
        """
        if self._writer is None or self.ready is None:
            raise WorkerLostError(self.device)
        future: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._pending[work.request_id] = future
        if on_progress is not None:
            self._listeners[work.request_id] = on_progress
        write_frame(self._writer, messages.encode(work))
        try:
            report = await future
        except asyncio.CancelledError:
            self._send(Abort(work.request_id))
            raise
        finally:
            self._pending.pop(work.request_id, None)
            self._listeners.pop(work.request_id, None)
        if isinstance(report, Failed):
            raise error_of(report)
        return report

    async def stop(self) -> None:
        """End the process; requests still pending fail."""
        self._stopping = True
        self._send(Shutdown())
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._reap()
        self._fail_pending()

    # --- the process

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "generator_service.engine.worker_process",
                "--fd",
                str(theirs.fileno()),
                "--options",
                self._options.to_json(),
                pass_fds=(theirs.fileno(),),
            )
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:  # a stop may come in the middle of a restart
            ours.close()
            raise
        finally:
            theirs.close()
        return reader

    async def _first_report(self, reader: asyncio.StreamReader) -> Ready | StartFailed:
        frame = await read_frame(reader)
        if frame is None:
            assert self._process is not None
            return StartFailed(f"its process ended with status {await self._process.wait()}")
        report = messages.decode_report(frame)
        if isinstance(report, Ready):
            self.ready, self._heard_s = report, time.monotonic()
            self._on_change()
            return report
        assert isinstance(report, StartFailed)
        return report

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Read reports until the worker is lost, then start it again, until stop."""
        while not self._stopping:
            watchdog = asyncio.create_task(self._watch())
            try:
                await self._read(reader)
            finally:
                watchdog.cancel()
            await self._lost()
            reader = await self._restart()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            self._heard_s = time.monotonic()
            report = messages.decode_report(frame)
            if isinstance(report, Stats):
                self.stats = report
                continue
            assert not isinstance(report, Ready | StartFailed)
            if isinstance(report, Progress):
                if (listener := self._listeners.get(report.request_id)) is not None:
                    listener(report)
                continue
            future = self._pending.get(report.request_id)
            if future is not None and not future.done():
                future.set_result(report)

    async def _watch(self) -> None:
        silence_s = 0.0
        while silence_s < self._heartbeat_timeout_s:
            await asyncio.sleep(self._heartbeat_timeout_s - silence_s)
            silence_s = time.monotonic() - self._heard_s
        logger.error("no heartbeat: the worker is killed", extra={"device": self.device})
        assert self._process is not None
        self._process.kill()

    async def _lost(self) -> None:
        self.ready = None
        logger.error("worker lost", extra={"device": self.device, "pending": len(self._pending)})
        self._fail_pending()
        self._on_change()
        await self._reap()

    async def _restart(self) -> asyncio.StreamReader:
        for attempt in itertools.count():
            await asyncio.sleep(_RESTART_BACKOFF_S[min(attempt, len(_RESTART_BACKOFF_S) - 1)])
            self.restarts += 1
            reader = await self._spawn()
            report = await self._first_report(reader)
            if isinstance(report, Ready):
                logger.info("worker restarted", extra={"device": self.device, "restarts": self.restarts})
                return reader
            logger.error("worker cannot start", extra={"device": self.device, "reason": report.message})
            await self._reap()
        raise AssertionError

    async def _reap(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_GOODBYE_S):  # wait_for may swallow a cancellation
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._process = None

    def _send(self, command: Abort | Shutdown) -> None:
        if self._writer is not None and not self._writer.is_closing():
            write_frame(self._writer, messages.encode(command))

    def _fail_pending(self) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(WorkerLostError(self.device))
