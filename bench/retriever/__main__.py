"""The served retriever beside faiss called directly and RagRetriever: `make bench-retriever`."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.retriever.changes import measure_changes
from bench.retriever.direct import CLIENTS, QUESTIONS_A_REQUEST, Direct, measure_direct
from bench.retriever.served import Load, Served, ask, ask_each, requests, served
from bench.retriever.workload import N_DOCS, Corpus, Floats, factory_strings, index, question_texts
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot

_QUESTIONS = 512
_RECALL_QUESTIONS = 128
_ROUNDS = 4
_HUGGING_FACE_DOCS = 100_000
"""RagRetriever holds every document and vector in memory."""


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
    baselines, found = measure_direct(case.faiss(), questions, case.seconds)
    for baseline in baselines:
        shown = {min(size * CLIENTS, len(questions)): together for size, together in baseline.batches.items()}
        for batch, together in shown.items():
            yield case.row("throughput", f"{baseline.name}, batches of {batch}", together, "searches/s")
        yield case.row("alone", f"{baseline.name}, median", baseline.alone_ms, "ms")
    found = found[:_RECALL_QUESTIONS]
    # A large index takes seconds for what 64 clients ask at once; each of them is to be answered a few times.
    case = replace(case, seconds=max(case.seconds, _ROUNDS * CLIENTS / baselines[-1].batches[1]))
    yield case.row("quality", f"recall@{N_DOCS}", recall(case.corpus, questions, found), "")
    with served(case.folder) as service:
        ask_each(service.address, whole, clients=CLIENTS)
        yield from _throughput(case, service, baselines, bare, whole, "")
        yield from _several_a_request(case, service, baselines, questions)
        yield from _alone(case, service, baselines, bare, whole, found)
        yield case.row("memory", "served, own pages", service.memory_mib(), "MiB")
        yield case.row("memory", "served, resident", service.resident_mib(), "MiB")
    with served(case.folder, *_UNCACHED) as service:
        yield from _throughput(case, service, baselines, bare, whole, ", nothing cached")
        assembled = ask(service.address, whole, clients=1, seconds=case.seconds)
        median_ms = assembled.quantile_ms(0.5)
        yield case.row("alone", "served with contexts, nothing cached, median", median_ms, "ms")
        for baseline in baselines:
            figure = f"overhead to {baseline.name}, nothing cached"
            yield case.row("alone", figure, median_ms - baseline.alone_ms, "ms", "at most 2")


def _alone(
    case: Case,
    service: Served,
    baselines: Sequence[Direct],
    bare: list[bytes],
    whole: list[bytes],
    found: np.ndarray,
) -> Iterator[Row]:
    one = ask(service.address, bare, clients=1, seconds=case.seconds)
    yield from _same_rows(case, one, found)
    assembled = ask(service.address, whole, clients=1, seconds=case.seconds)
    yield case.row("alone", "served, search only, median", one.quantile_ms(0.5), "ms")
    yield case.row("alone", "served, search only, p99", one.quantile_ms(0.99), "ms")
    yield case.row("alone", "served with contexts, median", assembled.quantile_ms(0.5), "ms")
    yield case.row("alone", "served with contexts, p99", assembled.quantile_ms(0.99), "ms")
    for baseline in baselines:
        overhead = assembled.quantile_ms(0.5) - baseline.alone_ms
        figure = f"overhead to {baseline.name}, contexts included"
        yield case.row("alone", figure, overhead, "ms", "at most 2")
    assembly = assembled.quantile_ms(0.5) - one.quantile_ms(0.5)
    yield case.row("alone", "of it context assembly", assembly, "ms")


def _throughput(
    case: Case,
    service: Served,
    baselines: Sequence[Direct],
    bare: list[bytes],
    whole: list[bytes],
    how: str,
    size: int = 1,
) -> Iterator[Row]:
    for name, asked, bar in (("search only", bare, "at least 0.85"), ("with contexts", whole, "")):
        load = ask(service.address, asked, clients=CLIENTS, seconds=case.seconds)
        figure, searches_per_s = f"served, {name}{how}", size * load.searches_per_s
        yield case.row("throughput", f"{figure}, {CLIENTS} clients", searches_per_s, "searches/s")
        yield case.row("throughput", f"{figure}, p99", load.quantile_ms(0.99), "ms")
        for baseline in baselines:
            ratio = searches_per_s / baseline.batches[size]
            yield case.row("throughput", f"{figure}, to {baseline.name}", ratio, "ratio", bar)


def _several_a_request(
    case: Case, service: Served, baselines: Sequence[Direct], questions: Floats
) -> Iterator[Row]:
    """The same clients with several questions in each request: what a call costs is shared by them."""
    texts = question_texts(len(questions))
    for size in QUESTIONS_A_REQUEST:
        bare, whole = (requests(questions, texts, contexts=contexts, size=size) for contexts in (False, True))
        seconds = max(case.seconds, _ROUNDS * size * CLIENTS / baselines[-1].batches[size])
        longer = replace(case, seconds=seconds)
        yield from _throughput(longer, service, baselines, bare, whole, f", {size} questions a request", size)


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
    # While it is upserted to, the corpus grows to many times its size: searches are slower by that alone.
    before, after = ("idle", measured.idle), ("idle, compacted", measured.compacted)
    loads = [
        ("idle", measured.idle, ()),
        ("upserting", measured.upserting, (before, after)),
        ("compacting for the first time", measured.first_compacting, ()),
        ("idle, compacted", measured.compacted, ()),
        ("compacting again", measured.compacting, (after,)),
    ]
    for name, load, others in loads:
        p99_ms = load.quantile_ms(0.99)
        yield case.row("changes", f"search while {name}, p50", load.quantile_ms(0.5), "ms")
        yield case.row("changes", f"search while {name}, p99", p99_ms, "ms")
        for other, idle in others:
            ratio = p99_ms / idle.quantile_ms(0.99)
            yield case.row("changes", f"search while {name}, p99 to {other}", ratio, "ratio", "at most 2")


def _against_hugging_face(
    case: Case, whole: list[bytes], questions: Floats, texts: list[str], scratch: Path
) -> Iterator[Row]:
    # Imported here: the rest of the benchmark needs neither datasets nor torch.
    from bench.retriever.hugging_face import retriever, searches_per_s  # noqa: PLC0415

    asked = {size: requests(questions, texts, contexts=True, size=size) for size in QUESTIONS_A_REQUEST}
    asked = {1: whole} | asked
    named = {size: "" if size == 1 else f", {size} questions a call" for size in asked}
    theirs, made = {}, retriever(case.corpus, case.folder, scratch)
    for size, each in named.items():
        theirs[size] = searches_per_s(
            made, questions, texts, clients=CLIENTS, seconds=case.seconds, size=size
        )
        yield case.row("hugging face", f"RagRetriever{each}, {CLIENTS} threads", theirs[size], "searches/s")
    for name, flags in (("with contexts", ()), ("with contexts, nothing cached", _UNCACHED)):
        with served(case.folder, *flags) as service:
            ask_each(service.address, whole, clients=CLIENTS)
            for size, each in named.items():
                load = ask(service.address, asked[size], clients=CLIENTS, seconds=case.seconds)
                ours, figure = size * load.searches_per_s, f"served {name}{each}"
                yield case.row("hugging face", f"{figure}, {CLIENTS} clients", ours, "searches/s")
                ratio = ours / theirs[size]
                yield case.row("hugging face", f"{figure}, to RagRetriever", ratio, "ratio", "at least 10")


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
        if size > _HUGGING_FACE_DOCS or (arguments.quick and size != max(docs)):
            parts.discard("hugging-face")
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
