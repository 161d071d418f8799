"""How cost grows: questions a second against documents, beams, context and answer length: `make bench-growth`."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.load import checkpoint, report
from bench.load.in_process import InProcess
from bench.load.questions import Mix, draw
from bench.machine import describe, num_cores
from generator_service.types import Strategy

N_DOCS, NUM_BEAMS, CONTEXT_LENGTH, ANSWER_LENGTH = "n_docs", "num_beams", "context_length", "answer_length"
STANDARD = {N_DOCS: 5, NUM_BEAMS: 4, CONTEXT_LENGTH: 170, ANSWER_LENGTH: 20}
SWEEPS: dict[str, Sequence[int]] = {
    N_DOCS: (1, 2, 5, 10, 20),
    NUM_BEAMS: (1, 2, 4, 8),
    CONTEXT_LENGTH: (50, 100, 170, 300, 500),
    ANSWER_LENGTH: (5, 10, 20, 50, 100),
}

_TICKS = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Row:
    """Questions a second where one of the four differs from STANDARD."""

    model: str
    strategy: str
    batch: int
    varied: str
    n_docs: int
    num_beams: int
    context_length: int
    answer_length: int
    qps: float


def measure(model: str, engine: InProcess, config: Any, batch: int, repeat: int) -> Iterator[Row]:
    """Each point of each sweep, for both strategies; STANDARD, where the sweeps cross, once."""
    numbers = itertools.count()
    standard: dict[Strategy, float] = {}
    for strategy, (varied, values) in itertools.product(Strategy, SWEEPS.items()):
        for value in values:
            point = {**STANDARD, varied: value}
            known = standard.get(strategy) if point == STANDARD else None
            qps = known or _qps(engine, config, strategy, point, batch, repeat, numbers)
            if point == STANDARD:
                standard[strategy] = qps
            yield Row(model, strategy.value, batch, varied, **point, qps=qps)


def _qps(
    engine: InProcess,
    config: Any,
    strategy: Strategy,
    point: dict[str, int],
    batch: int,
    repeat: int,
    numbers: Iterator[int],
) -> float:
    """The best of several runs: the one that the machine disturbed least."""
    mix = Mix(
        strategies=(strategy,),
        num_beams=(point[NUM_BEAMS],),
        answer_lengths=(point[ANSWER_LENGTH],),
        shares=(1.0,),
        n_docs=point[N_DOCS],
        context_length=(point[CONTEXT_LENGTH], point[CONTEXT_LENGTH]),
    )
    questions = draw(mix, batch, config.vocab_size, seed=1)
    times = [engine.answer([q.work(next(numbers), config) for q in questions], batch) for _ in range(repeat)]
    return batch / min(times)


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """Four panels, logarithmic on both axes: a line of slope -1 is cost in proportion."""
    import matplotlib as mpl  # noqa: PLC0415  (an extra, that only the plot needs)

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ragpair"  # equal figures give an equal file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharey=True, layout="constrained")
    least, most = min(r.qps for r in rows), max(r.qps for r in rows)
    ticks = [t for t in _TICKS if least / 2 <= t <= most * 2]
    for axis, (varied, values) in zip(axes.flat, SWEEPS.items(), strict=True):
        for strategy, mark in zip(Strategy, "so", strict=True):
            chosen = [r for r in rows if r.varied == varied and r.strategy == strategy.value]
            axis.loglog(
                [getattr(r, varied) for r in chosen],
                [r.qps for r in chosen],
                f"{mark}-",
                label=strategy.value,
            )
        axis.set_xticks(values, [str(v) for v in values])
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ylim(least / 1.2, most * 1.2)
        axis.minorticks_off()
        axis.set_xlabel(varied)
        axis.set_ylabel("questions a second")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Print the table; JSON=file writes its rows, --plot file draws them; QUICK=1 takes about two minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw them here, as SVG; needs the extra `bench`")
    parser.add_argument("--quick", action="store_true", help="the small model, each point once")
    parser.add_argument("--model", choices=sorted(checkpoint.SHAPES))
    parser.add_argument("--batch", type=int, default=2, help="questions that run together")
    parser.add_argument("--threads", type=int, default=num_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = arguments.model or (checkpoint.SMALL if arguments.quick else checkpoint.BART_BASE)
    with tempfile.TemporaryDirectory() as name:
        config = checkpoint.save(model, Path(name))
        engine = InProcess.of_generator(Path(name))
    rows, console = [], Console(width=130)
    for row in measure(model, engine, config, arguments.batch, 1 if arguments.quick else 2):
        Console(stderr=True).print(f"{row.strategy} {row.varied} {getattr(row, row.varied)}: {row.qps:.3f}")
        rows.append(row)
    found = [asdict(row) for row in rows]
    title = f"{model}, {describe(arguments.threads)}, {arguments.batch} questions at once"
    report.show(title, found, console)
    report.write(found, arguments.json)
    if arguments.plot is not None:
        standard = ", ".join(f"{name} {value}" for name, value in STANDARD.items())
        plot(rows, f"{title}\nwhat is not varied: {standard}", arguments.plot)


if __name__ == "__main__":
    main()
