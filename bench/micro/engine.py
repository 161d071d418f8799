"""Questions a second of the engine and of Hugging Face's classes, in one run: `make bench-engine`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import RagSequenceForGeneration, RagTokenForGeneration
from transformers.utils import logging as transformers_logging

from bench.micro.workload import Questions, Shape, generator, questions, rag
from generator_service.engine.messages import GenerateAnswer
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.model.loader import as_backbone
from generator_service.model.paged.backbone import PagedBackbone, paged
from generator_service.types import (
    Compatibility,
    GenerationSettings,
    Hypothesis,
    Quantization,
    SequenceDecoding,
    Strategy,
)

GRAPH_ROWS = 1280
"""Rows of the largest step with a CUDA graph: 64 questions of Shape(). A worker's is its max_rows."""
_ARENA_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Row:
    """One line of the table: questions a second of both sides, and their ratio."""

    model: str
    strategy: str
    mode: str
    dtype: str
    threads: int
    n_docs: int
    beams: int
    batch: int
    ours_qps: float
    hf_qps: float
    ratio: float


class Engine:
    """Our side, in this process: a model runner without the service around it.

    It runs on the model's device; on CUDA as a worker does, over an arena of pages, with graphs of graph_rows rows (0:
    without). forced_tokens asks for BART's usual first and last token.
    """

    def __init__(
        self,
        model: Any,
        shape: Shape,
        quantization: Quantization = Quantization.NONE,
        *,
        graph_rows: int = GRAPH_ROWS,
        forced_tokens: bool = False,
    ) -> None:
        backbone = as_backbone(model, quantization=quantization)
        if model.device.type == "cuda":
            backbone = paged(backbone, budget_bytes=_ARENA_BYTES, max_rows=graph_rows)
        if isinstance(backbone, PagedBackbone):
            backbone.warm_up()
        self._runner = ModelRunner(backbone, None, model.device)
        self._config, self._shape, self._forced = model.config, shape, forced_tokens
        self._ids = itertools.count()

    def answer(
        self, batch: Questions, strategy: Strategy, compatibility: Compatibility
    ) -> list[list[Hypothesis]]:
        """Answer a batch of questions that arrive together; the answers stand in their order."""
        requests = list(self._requests(batch, strategy, compatibility))
        schedule, answers = Schedule(admit=requests), dict[int, list[Hypothesis]]()
        while len(answers) < len(requests):
            for request, hypotheses in self._runner.execute(schedule).answered:
                answers[request.request_id] = hypotheses
            schedule = Schedule()
        return [answers[request.request_id] for request in requests]

    def _requests(
        self, batch: Questions, strategy: Strategy, compatibility: Compatibility
    ) -> Iterator[Request]:
        n_docs, config = self._shape.n_docs, self._config
        settings = GenerationSettings(
            max_length=self._shape.answer_length + 1,
            min_length=self._shape.answer_length + 1,
            num_beams=self._shape.num_beams,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_ids=(config.eos_token_id,),
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            forced_bos_token_id=config.bos_token_id if self._forced else None,
            forced_eos_token_id=config.eos_token_id if self._forced else None,
        )
        for index, scores in enumerate(batch.doc_scores.tolist()):
            rows = range(index * n_docs, (index + 1) * n_docs)
            yield Request(
                GenerateAnswer(
                    request_id=next(self._ids),
                    strategy=strategy,
                    sequence_decoding=SequenceDecoding.THOROUGH,
                    compatibility=compatibility,
                    settings=settings,
                    contexts=[batch.input_ids[r][batch.attention_mask[r].bool()].tolist() for r in rows],
                    padded_contexts=[batch.input_ids[r].tolist() for r in rows],
                    doc_scores=scores,
                    do_deduplication=True,
                    exclude_bos_score=True,
                )
            )


def hugging_face(model: Any, shape: Shape, strategy: Strategy) -> Callable[[Questions], None]:
    """The other side: generate of the class, on the contexts padded as RagRetriever pads them.

    It runs on the model's device and in its dtype.
    """
    cls = RagTokenForGeneration if strategy is Strategy.RAG_TOKEN else RagSequenceForGeneration
    device = model.device
    whole = rag(cls, model, shape.n_docs).to(device)
    length = shape.answer_length + 1

    def answer(batch: Questions) -> None:
        whole.generate(
            context_input_ids=batch.input_ids.to(device),
            context_attention_mask=batch.attention_mask.to(device),
            doc_scores=batch.doc_scores.to(device),
            num_beams=shape.num_beams,
            max_length=length,
            min_length=length,
            n_docs=shape.n_docs,
        )

    return answer


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The least time of several runs: the one that the machine disturbed least."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(
    family: str,
    shape: Shape,
    batches: list[int],
    quantizations: list[Quantization],
    *,
    quick: bool,
    threads: int,
) -> Iterator[Row]:
    """Both sides on the same questions, one after the other."""
    model = generator(family)
    engines = {q: Engine(model, shape, q) for q in quantizations}
    cases = [
        (Strategy.RAG_SEQUENCE, Compatibility.MASKED),
        (Strategy.RAG_SEQUENCE, Compatibility.HF),
        (Strategy.RAG_TOKEN, Compatibility.MASKED),
    ]
    theirs: dict[tuple[Strategy, int], float] = {}
    repeat = 1 if quick else 2  # as often on both sides
    for batch, (strategy, mode) in itertools.product(batches, cases):
        ids = (model.config.vocab_size, model.config.pad_token_id)
        asked = questions(shape, batch, *ids)
        if (strategy, batch) not in theirs:
            # RagSequence goes through a batch question by question, so that one tells its speed
            one = asked if strategy is Strategy.RAG_TOKEN else questions(shape, 1, *ids)
            other = hugging_face(model, shape, strategy)
            took = seconds(lambda other=other, one=one: other(one), repeat)
            theirs[strategy, batch] = len(one.doc_scores) / took
        hf = theirs[strategy, batch]
        for quantization, engine in engines.items():
            ours = batch / seconds(
                lambda engine=engine, asked=asked, strategy=strategy, mode=mode: engine.answer(
                    asked, strategy, mode
                ),
                repeat,
            )
            yield Row(
                family,
                strategy.value,
                mode.value,
                "int8" if quantization is Quantization.INT8 else "float32",
                threads,
                shape.n_docs,
                shape.num_beams,
                batch,
                ours,
                hf,
                ours / hf,
            )


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 measures the smaller part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one model, fewer repetitions")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--models", nargs="+", default=None, choices=["bart-base", "bart-large", "t5-base"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--quantizations", nargs="+", type=Quantization, default=list(Quantization))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    models = arguments.models or (["bart-base"] if arguments.quick else ["bart-base", "t5-base"])
    table = Table(
        title=f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads"
    )
    for name in Row.__dataclass_fields__:
        table.add_column(name)
    rows = []
    for family in models:
        for row in measure(
            family,
            Shape(),
            arguments.batches,
            arguments.quantizations,
            quick=arguments.quick,
            threads=arguments.threads,
        ):
            rows.append(row)
            cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in asdict(row).values()]
            table.add_row(*cells)
            Console(stderr=True).print(" ".join(cells))
    Console(width=130).print(table)
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
