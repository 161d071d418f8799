"""Shows what tuning measured: a table, JSON, a plot."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from retriever_service.errors import BuildError
from retriever_service.ingest.tune import Setting, Trial


def flags(setting: Setting) -> str:
    """The setting as a request's fields have it; empty where the index has no knob."""
    chosen = {
        name: value for name, value in asdict(setting).items() if value not in {0, 1} or name == "nprobe"
    }
    return ", ".join(f"{name} {value}" for name, value in chosen.items() if value)


def as_table(trials: list[Trial], best: Trial, n_docs: int, target_recall: float) -> Table:
    """The trials, with the recommended one marked, and whether it reaches the recall asked for."""
    reached = best.recall >= target_recall
    table = Table(
        title="recall against latency, one question at a time",
        caption=f"the target recall {target_recall:g} is reached"
        if reached
        else f"no setting tried reaches the target recall {target_recall:g}: the nearest is recommended",
    )
    for name in ("setting", f"recall@{n_docs}", "p50 ms", "p99 ms", "searches/s, batches of 64", ""):
        table.add_column(name, justify="left" if name in {"setting", ""} else "right")
    for trial in trials:
        table.add_row(
            flags(trial.setting) or "(no knobs)",
            f"{trial.recall:.3f}",
            f"{trial.p50_ms:.2f}",
            f"{trial.p99_ms:.2f}",
            f"{trial.searches_per_s:,.0f}",
            "recommended" if trial is best else "",
            style="bold" if trial is best else None,
        )
    return table


def as_json(trials: list[Trial], best: Trial, n_docs: int, target_recall: float) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "n_docs": n_docs,
        "target_recall": target_recall,
        "reached": best.recall >= target_recall,
        "recommended": asdict(best),
        "trials": [asdict(trial) for trial in trials],
    }


def plot(trials: list[Trial], best: Trial, n_docs: int, file: Path) -> None:
    """Writes recall over latency, a line for each rescore_factor, as SVG, PNG or PDF by the file's name.

    Raises BuildError where matplotlib is not installed or knows no such format.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise BuildError("--plot needs matplotlib: install ragpair with its extra plot") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for factor in sorted({trial.setting.rescore_factor for trial in trials}):
        line = [trial for trial in trials if trial.setting.rescore_factor == factor]
        axes.plot(
            [trial.p50_ms for trial in line],
            [trial.recall for trial in line],
            marker="o",
            label=f"rescore_factor {factor}",
        )
    axes.annotate(
        flags(best.setting) or "recommended",
        (best.p50_ms, best.recall),
        xytext=(8, -14),
        textcoords="offset points",
        weight="bold",
    )
    axes.set(xscale="log", xlabel="latency of one question, median, ms", ylabel=f"recall@{n_docs}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file)
    except ValueError as error:
        raise BuildError(f"--plot {file}: {error}") from error
