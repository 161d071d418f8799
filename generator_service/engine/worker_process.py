"""A worker process: loads the models on its device and runs the engine's loop until the service hangs up."""

from __future__ import annotations

import argparse
import logging
import queue
import signal
import socket
import threading
import time

import torch
from transformers.utils.logging import disable_progress_bar

from generator_service.engine import messages
from generator_service.engine.devices import memory_bytes, num_cores
from generator_service.engine.engine_core import EngineCore
from generator_service.engine.frames import receive_frame, send_frame
from generator_service.engine.messages import (
    Abort,
    Command,
    EncodeQuestion,
    Failed,
    GenerateAnswer,
    Ready,
    Report,
    ScoreTarget,
    Shutdown,
    StartFailed,
)
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.pass_messages import ReleasePast
from generator_service.engine.pass_runner import PassRunner
from generator_service.engine.past_store import PastStore
from generator_service.engine.scheduler import SchedulerLimits
from generator_service.engine.worker_options import WorkerOptions
from generator_service.model.loader import LoadedModel, load
from generator_service.model.paged.backbone import PagedBackbone, paged
from generator_service.types import Compatibility, GenerationSettings, SequenceDecoding, Strategy
from rag_serving.garbage import kept_for_good
from rag_serving.logging import configure_logging

logger = logging.getLogger(__name__)

_CPU_SHARE = 0.25
_CUDA_SHARE = 0.8


class WorkerProcess:
    """The loop: take commands, step, report; a heartbeat in between."""

    def __init__(self, connection: socket.socket, options: WorkerOptions) -> None:
        self._connection, self._options = connection, options
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def run(self) -> None:
        """Load, warm up, serve; returns when the service has hung up."""
        threading.Thread(target=self._receive, name="commands", daemon=True).start()
        try:
            core, ready = self._start()
        except Exception as error:
            logger.exception("cannot load the models")
            self._send(StartFailed(f"{type(error).__name__}: {error}"))
            return
        with kept_for_good():
            self._send(ready)
            self._serve(core)

    def _start(self) -> tuple[EngineCore, Ready]:
        options = self._options
        device = torch.device(options.device)
        if device.type == "cpu":
            torch.set_num_threads(options.threads or num_cores())
        loaded = load(options.source, device)
        budget = options.cache_budget_bytes or _automatic_budget(device)
        backbone = loaded.backbone
        if device.type == "cuda":
            torch.cuda.set_device(device)
            graph_rows = options.max_rows if options.cuda_graphs else 0
            backbone = paged(backbone, budget_bytes=budget, max_rows=graph_rows)
            if isinstance(backbone, PagedBackbone):
                backbone.warm_up()
        limits = SchedulerLimits(
            max_rows=options.max_rows,
            max_context_tokens=options.max_context_tokens,
            batching=options.batching,
        )
        passes = PassRunner(
            loaded.generator,
            loaded.question_encoder,
            PastStore(
                max_handles=options.max_past_key_values,
                max_bytes=options.past_key_values_bytes,
                expires_s=options.past_key_values_expires_s,
            ),
            max_output_bytes=options.max_forward_bytes,
        )
        runner = ModelRunner(backbone, loaded.question_encoder, device, passes)
        core = EngineCore(runner, cache_budget_bytes=budget, limits=limits)
        started = time.perf_counter()
        _warm_up(core, loaded)
        logger.info(
            "warmed up", extra={"device": options.device, "seconds": round(time.perf_counter() - started, 3)}
        )
        encoder = loaded.question_encoder
        return core, Ready(
            decoder=backbone.name,
            vocab_size=backbone.vocab_size,
            max_positions=backbone.max_positions,
            cache_budget_bytes=budget,
            num_parameters=loaded.num_parameters,
            dtype=loaded.dtype,
            retrieval_vector_size=encoder.dimension if encoder else 0,
            question_vocab_size=encoder.vocab_size if encoder else 0,
            question_max_length=encoder.max_length if encoder else 0,
        )

    def _serve(self, core: EngineCore) -> None:
        beat_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s - beat_s >= self._options.heartbeat_s:
                self._send(core.stats())
                core.expire_past()
                beat_s = now_s
            for command in self._pending(block=not core.has_work()):
                match command:
                    case Shutdown():
                        return
                    case Abort():
                        core.abort(command.request_id)
                    case ReleasePast():
                        self._send(core.release_past(command))
                    case _:
                        refused = core.add_request(command)
                        if refused is not None:
                            self._send(refused)
            if core.has_work():
                for report in core.step():
                    self._send(report)

    def _pending(self, *, block: bool) -> list[Command]:
        commands = []
        try:
            if block:
                commands.append(self._commands.get(timeout=self._options.heartbeat_s))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def _receive(self) -> None:
        while (frame := receive_frame(self._connection)) is not None:
            self._commands.put(messages.decode_command(frame))
        self._commands.put(Shutdown())

    def _send(self, report: Report) -> None:
        try:
            send_frame(self._connection, messages.encode(report))
        except OSError:
            logger.info("the service has hung up")
            raise SystemExit(0) from None


def _automatic_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return int(memory_bytes() * _CPU_SHARE)


def _warm_up(core: EngineCore, loaded: LoadedModel) -> None:
    """Go once through every path, so that the first caller does not pay for it."""
    settings = GenerationSettings(max_length=4, num_beams=2, eos_token_ids=(1,), pad_token_id=1)
    contexts = [[2, 2, 2], [2, 2]]
    for number, strategy in enumerate(Strategy):
        work = GenerateAnswer(
            request_id=-1 - number,
            strategy=strategy,
            sequence_decoding=SequenceDecoding.THOROUGH,
            compatibility=Compatibility.MASKED,
            settings=settings,
            contexts=contexts,
            padded_contexts=None,
            doc_scores=[1.0, 0.0],
            do_deduplication=True,
            exclude_bos_score=True,
        )
        core.add_request(work)
    target = ScoreTarget(
        request_id=-3,
        strategy=Strategy.RAG_TOKEN,
        compatibility=Compatibility.MASKED,
        contexts=contexts,
        doc_scores=[1.0, 0.0],
        labels=[2, 2],
        pad_token_id=1,
        exclude_first=False,
    )
    core.add_request(target)
    if loaded.question_encoder is not None:
        core.add_request(EncodeQuestion(request_id=-4, input_ids=[1, 1], attention_mask=[1, 1]))
    while core.has_work():
        for report in core.step():
            if isinstance(report, Failed):
                raise RuntimeError(f"the warm-up failed: {report.message}")


def main() -> None:
    """`python -m generator_service.engine.worker_process`: started by the service, never by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--options", type=WorkerOptions.from_json, required=True)
    arguments = parser.parse_args()
    configure_logging(arguments.options.log_level, arguments.options.log_format)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights: a log is no terminal
    for number in (signal.SIGINT, signal.SIGTERM):  # the service stops us, once it has drained
        signal.signal(number, signal.SIG_IGN)
    WorkerProcess(socket.socket(fileno=arguments.fd), arguments.options).run()


if __name__ == "__main__":
    main()
