"""The engine called in this process: the worker's loop without service, worker process or wire."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from generator_service.engine.engine_core import EngineCore
from generator_service.engine.messages import Failed, GenerateAnswer
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.scheduler import SchedulerLimits
from generator_service.model.loader import LoadedModel, load
from generator_service.types import ModelSource, Pooling

_CACHE_BYTES = 4 * 2**30


class InProcess:
    """An EngineCore on the CPU, with the worker's defaults."""

    def __init__(self, loaded: LoadedModel) -> None:
        runner = ModelRunner(loaded.backbone, loaded.question_encoder, torch.device("cpu"))
        self._core = EngineCore(runner, cache_budget_bytes=_CACHE_BYTES, limits=SchedulerLimits())

    @classmethod
    def of_generator(cls, folder: Path) -> InProcess:
        """Loads a generator's folder as a worker would."""
        source = ModelSource(
            rag_checkpoint=None,
            question_encoder=None,
            generator=str(folder),
            pooling=Pooling.FIRST_OUTPUT,
            normalize=False,
            score_scale=1.0,
            dtype="float32",
            decoder="auto",
        )
        return cls(load(source, torch.device("cpu")))

    def answer(self, works: Sequence[GenerateAnswer], concurrency: int) -> float:
        """Answers all, `concurrency` at a time as the closed loop over the wire does; returns the seconds.

        The request_ids of works must differ. Raises RuntimeError where one fails.
        """
        left = iter(works)
        began = time.perf_counter()
        for _, work in zip(range(concurrency), left, strict=False):
            self._core.add_request(work)
        while self._core.has_work():
            for report in self._core.step():
                if isinstance(report, Failed):
                    raise RuntimeError(report.message)
                if (following := next(left, None)) is not None:
                    self._core.add_request(following)
        return time.perf_counter() - began
