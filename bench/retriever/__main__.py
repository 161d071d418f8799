"""The served retriever beside faiss called directly and RagRetriever: `make bench-retriever`."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.retriever.changes import measure_changes
from bench.retriever.served import Load, Served, ask, requests, served
from bench.retriever.workload import N_DOCS, Corpus, Floats, factory_strings, index, question_texts
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot
from retriever_service.types import SearchParameters

_CLIENTS = 64
_QUESTIONS = 512
_RECALL_QUESTIONS = 128
_ROUNDS = 4


@dataclass(frozen=True)
class Row:
    """One figure. `bar` is what it should reach; none where it is told without one."""

    part: str
    index: str
    docs: int
    dim: int
    figure: str
    value: float
    unit: str
    bar: str = ""


@dataclass(frozen=True)
class Case:
    """One index to measure: faiss on it directly, and the service on it."""

    corpus: Corpus
    name: str
    folder: Path
    seconds: float

    def row(self, part: str, figure: str, value: float, unit: str, bar: str = "") -> Row:
        """A figure of this case."""
        return Row(part, self.name, self.corpus.size, self.corpus.dim, figure, value, unit, bar)

    def faiss(self) -> FaissIndex:
        """The index file, loaded as the service loads it."""
        return FaissIndex.load(Snapshot.open(self.folder).index_file)


def direct(loaded: FaissIndex, questions: Floats, batch: int, seconds: float) -> tuple[float, float]:
    """Searches a second and the median latency in ms of faiss called directly, so many questions at a time."""
    parameters, times_s = SearchParameters(), []
    loaded.search(questions[:batch], N_DOCS, parameters)
    while sum(times_s) < seconds:
        start = len(times_s) * batch % (len(questions) - batch + 1)
        began_s = time.perf_counter()
        loaded.search(questions[start : start + batch], N_DOCS, parameters)
        times_s.append(time.perf_counter() - began_s)
    return batch * len(times_s) / sum(times_s), 1000 * float(np.median(times_s))


_UNCACHED = ("--document-cache-bytes=0", "--context-cache-bytes=0")
PARTS = ("search", "start", "hugging-face", "changes")


def measure(case: Case, parts: Sequence[str], scratch: Path) -> Iterator[Row]:
    """The figures of one index, part by part."""
    questions, texts = case.corpus.questions(_QUESTIONS), question_texts(_QUESTIONS)
    bare, whole = (requests(questions, texts, contexts=contexts) for contexts in (False, True))
    if "search" in parts:
        yield from _search(case, questions, bare, whole)
    if "start" in parts:
        yield from _start(case)
    if "hugging-face" in parts:
        yield from _against_hugging_face(case, whole, questions, texts, scratch)
    if "changes" in parts:
        yield from _changes(case, bare, scratch)


def _search(case: Case, questions: Floats, bare: list[bytes], whole: list[bytes]) -> Iterator[Row]:
    loaded = case.faiss()
    together, _ = direct(loaded, questions, _CLIENTS, case.seconds)
    # A large index takes seconds for what 64 clients ask at once; each of them is to be answered a few times.
    case = replace(case, seconds=max(case.seconds, _ROUNDS * _CLIENTS / together))
    _, alone_ms = direct(loaded, questions, 1, case.seconds)
    yield case.row("throughput", f"faiss, batches of {_CLIENTS}", together, "searches/s")
    yield case.row("alone", "faiss, median", alone_ms, "ms")
    found = loaded.search(questions[:_RECALL_QUESTIONS], N_DOCS, SearchParameters())[0]
    del loaded
    yield case.row("quality", f"recall@{N_DOCS}", recall(case.corpus, questions, found), "")
    with served(case.folder) as service:
        yield from _throughput(case, service, together, bare, whole, "")
        yield from _alone(case, service, alone_ms, bare, whole, found)
        yield case.row("memory", "served, own pages", service.memory_mib(), "MiB")
        yield case.row("memory", "served, resident", service.resident_mib(), "MiB")
    with served(case.folder, *_UNCACHED) as service:
        yield from _throughput(case, service, together, bare, whole, ", nothing cached")
        assembled = ask(service.address, whole, clients=1, seconds=case.seconds)
        median_ms = assembled.quantile_ms(0.5)
        yield case.row("alone", "served with contexts, nothing cached, median", median_ms, "ms")
        yield case.row("alone", "overhead, nothing cached", median_ms - alone_ms, "ms", "at most 2")


def _alone(
    case: Case, service: Served, alone_ms: float, bare: list[bytes], whole: list[bytes], found: np.ndarray
) -> Iterator[Row]:
    one = ask(service.address, bare, clients=1, seconds=case.seconds)
    yield from _same_rows(case, one, found)
    assembled = ask(service.address, whole, clients=1, seconds=case.seconds)
    yield case.row("alone", "served, search only, median", one.quantile_ms(0.5), "ms")
    yield case.row("alone", "served, search only, p99", one.quantile_ms(0.99), "ms")
    yield case.row("alone", "served with contexts, median", assembled.quantile_ms(0.5), "ms")
    yield case.row("alone", "served with contexts, p99", assembled.quantile_ms(0.99), "ms")
    overhead = assembled.quantile_ms(0.5) - alone_ms
    yield case.row("alone", "overhead, contexts included", overhead, "ms", "at most 2")
    assembly = assembled.quantile_ms(0.5) - one.quantile_ms(0.5)
    yield case.row("alone", "of it context assembly", assembly, "ms")


def _throughput(
    case: Case, service: Served, together: float, bare: list[bytes], whole: list[bytes], how: str
) -> Iterator[Row]:
    for name, asked, bar in (("search only", bare, "at least 0.85"), ("with contexts", whole, "")):
        load = ask(service.address, asked, clients=_CLIENTS, seconds=case.seconds)
        figure, ratio = f"served, {name}{how}", load.searches_per_s / together
        yield case.row("throughput", f"{figure}, {_CLIENTS} clients", load.searches_per_s, "searches/s")
        yield case.row("throughput", f"{figure}, p99", load.quantile_ms(0.99), "ms")
        yield case.row("throughput", f"{figure}, to faiss", ratio, "ratio", bar)


def _same_rows(case: Case, load: Load, found: np.ndarray) -> Iterator[Row]:
    """Equal recall: what is served are the rows that faiss gives."""
    rows = {question: row for question, row in load.rows().items() if question < len(found)}
    same = [set(row) == set(found[question].tolist()) for question, row in rows.items()]
    yield case.row("quality", "served rows that are faiss's", sum(same) / max(1, len(same)), "share", "1")


def _start(case: Case) -> Iterator[Row]:
    """From the command to the first answer, the index file in memory and mapped."""
    for name, flags in (("read", ()), ("mapped", ("--memory-map=true",))):
        with served(case.folder, *flags) as service:
            bar = "at most 5" if name == "mapped" else ""
            yield case.row("start", f"index {name}, first answer after", service.ready_after_s, "s", bar)
            yield case.row("start", f"index {name}, own pages", service.memory_mib(), "MiB")


def _changes(case: Case, bare: list[bytes], scratch: Path) -> Iterator[Row]:
    measured = measure_changes(case.corpus, case.folder, scratch, bare, case.seconds)
    yield case.row("changes", "durable upserts, batches of 100", measured.upserts_per_s, "documents/s")
    yield case.row("changes", "durable upserts, one at a time", measured.single_upserts_per_s, "documents/s")
    yield case.row("changes", "compaction", measured.compaction_s, "s")
    idle_ms = measured.idle.quantile_ms(0.99)
    loads = {"idle": measured.idle, "upserting": measured.upserting, "compacting": measured.compacting}
    for name, load in loads.items():
        yield case.row("changes", f"search while {name}, p50", load.quantile_ms(0.5), "ms")
        yield case.row("changes", f"search while {name}, p99", load.quantile_ms(0.99), "ms")
        if name != "idle":
            ratio = load.quantile_ms(0.99) / idle_ms
            yield case.row("changes", f"search while {name}, p99 to idle", ratio, "ratio", "at most 2")


def _against_hugging_face(
    case: Case, whole: list[bytes], questions: Floats, texts: list[str], scratch: Path
) -> Iterator[Row]:
    # Imported here: the rest of the benchmark needs neither datasets nor torch.
    from bench.retriever.hugging_face import retriever, searches_per_s  # noqa: PLC0415

    theirs = searches_per_s(
        retriever(case.corpus, case.folder, scratch), questions, texts, clients=_CLIENTS, seconds=case.seconds
    )
    yield case.row("hugging face", f"RagRetriever, {_CLIENTS} threads", theirs, "searches/s")
    for name, flags in (("with contexts", ()), ("with contexts, nothing cached", _UNCACHED)):
        with served(case.folder, *flags) as service:
            ours = ask(service.address, whole, clients=_CLIENTS, seconds=case.seconds).searches_per_s
        yield case.row("hugging face", f"served {name}, {_CLIENTS} clients", ours, "searches/s")
        yield case.row(
            "hugging face", f"served {name}, to RagRetriever", ours / theirs, "ratio", "at least 10"
        )


def recall(corpus: Corpus, questions: Floats, found: np.ndarray) -> float:
    """recall@n_docs of the rows found for the first questions, against an exact search."""
    exact = faiss.IndexFlatIP(corpus.dim)
    best = np.full((len(found), 0), 0.0, np.float32), np.empty((len(found), 0), np.int64)
    for start in range(0, corpus.size, 10_000):
        exact.reset()
        exact.add(corpus.vectors(start))
        scores, rows = exact.search(questions[: len(found)], N_DOCS)
        scores, rows = np.hstack([best[0], scores]), np.hstack([best[1], rows + start])
        order = np.argsort(-scores, axis=1)[:, :N_DOCS]
        best = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    hits = sum(len(np.intersect1d(mine, true)) for mine, true in zip(found, best[1], strict=True))
    return hits / found.size


def main() -> None:
    """Print the table; with JSON=file write its rows; QUICK=1 measures the smaller part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="10,000 and 100,000 documents of 384 dimensions")
    parser.add_argument("--docs", nargs="+", type=int)
    parser.add_argument("--dims", nargs="+", type=int)
    parser.add_argument("--kinds", nargs="+", choices=["Flat", "HNSW", "IVF-PQ"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--folder", type=Path, default=Path("var/bench"), help="indexes are kept here")
    arguments = parser.parse_args()
    docs = arguments.docs or ([10_000, 100_000] if arguments.quick else [10_000, 100_000, 1_000_000])
    dims = arguments.dims or ([384] if arguments.quick else [384, 768])
    kinds = arguments.kinds or (["Flat", "IVF-PQ"] if arguments.quick else ["Flat", "HNSW", "IVF-PQ"])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console, rows = Console(stderr=True), []
    machine = {"hardware": describe(faiss.omp_get_max_threads()), "command": shlex.join(sys.argv)}
    for dim, size, kind in itertools.product(dims, docs, kinds):
        corpus, factory = Corpus(size, dim), factory_strings(size)[kind]
        place = index(corpus, factory, arguments.folder)
        parts = set(arguments.parts)
        if size != min(100_000, max(docs)) or dim != min(dims):
            parts.discard("hugging-face")  # it holds every document and vector in memory
        for row in measure(Case(corpus, factory, place, arguments.seconds), sorted(parts), arguments.folder):
            rows.append(row)
            console.print(*_cells(row), highlight=False)
            if arguments.json is not None:
                with arguments.json.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(row) | machine) + "\n")
    Console(width=140).print(_table(rows, machine["hardware"]))


def _table(rows: list[Row], hardware: str) -> Table:
    table = Table(title=f"{hardware}, faiss {faiss.__version__}, {N_DOCS} documents a question")
    for name in Row.__dataclass_fields__:
        table.add_column(name, justify="right" if name in {"docs", "dim", "value"} else "left")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    return [f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(row).values()]


if __name__ == "__main__":
    main()
