"""faiss called directly: as it comes, and set up as the service sets it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from bench.retriever.workload import N_DOCS, Floats
from retriever_service.index.faiss_index import (
    FaissIndex,
    default_num_threads,
    multiply_batches,
    set_num_threads,
)
from retriever_service.main import search_threads
from retriever_service.types import SearchParameters

CLIENTS = 64
QUESTIONS_A_REQUEST = (8, 32)


@dataclass(frozen=True)
class Direct:
    """Searches a second by how many questions each of 64 clients asks at once, and one search's median in ms.

    A batch is what those clients have on their way together, or all questions that there are.
    """

    name: str
    batches: dict[int, float]
    alone_ms: float


def measure_direct(
    loaded: FaissIndex, questions: Floats, seconds: float
) -> tuple[list[Direct], npt.NDArray[np.int64]]:
    """faiss as it comes and as the service sets it up, and the rows int64 [questions, N_DOCS] that it finds."""
    index, parameters = loaded.faiss_index, SearchParameters()
    measured = [_direct("faiss", lambda asked: index.search(asked, N_DOCS), questions, seconds)]
    with _set_up_as_served(loaded):

        def search(asked: Floats) -> object:
            return loaded.search(asked, N_DOCS, parameters)

        measured.append(_direct("faiss set up as served", search, questions, seconds))
    return measured, loaded.search(questions, N_DOCS, parameters)[0]


def _direct(name: str, search: Callable[[Floats], object], questions: Floats, seconds: float) -> Direct:
    batch_of = {size: min(size * CLIENTS, len(questions)) for size in (1, *QUESTIONS_A_REQUEST)}
    found = {batch: _timed(search, questions, batch, seconds)[0] for batch in set(batch_of.values())}
    batches = {size: found[batch] for size, batch in batch_of.items()}
    return Direct(name, batches, _timed(search, questions, 1, seconds)[1])


def _timed(
    search: Callable[[Floats], object], questions: Floats, batch: int, seconds: float
) -> tuple[float, float]:
    """Searches a second and the median latency in ms, so many questions at a time."""
    times_s: list[float] = []
    search(questions[:batch])
    while sum(times_s) < seconds:
        start = len(times_s) * batch % (len(questions) - batch + 1)
        began_s = time.perf_counter()
        search(questions[start : start + batch])
        times_s.append(time.perf_counter() - began_s)
    return batch * len(times_s) / sum(times_s), 1000 * float(np.median(times_s))


@contextmanager
def _set_up_as_served(loaded: FaissIndex) -> Iterator[None]:
    """faiss's threads and settings as the service chooses them; as they were afterwards."""
    settings: Any = faiss.cvar  # type: ignore[attr-defined]  # not in its stubs
    names = [f"distance_compute_blas_{name}" for name in ("threshold", "query_bs", "database_bs")]
    before, threads = [getattr(settings, name) for name in names], default_num_threads()
    set_num_threads(search_threads(loaded))
    multiply_batches(search_threads(loaded))
    try:
        yield
    finally:
        set_num_threads(threads)
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)
