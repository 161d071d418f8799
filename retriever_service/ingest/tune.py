"""Measures recall against latency over the search knobs of an index, on its own documents."""

import bisect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retriever_service.errors import BuildError, InvalidSearchParametersError
from retriever_service.index.base import VectorIndex
from retriever_service.ingest.reader import CorpusReader
from retriever_service.store.base import DocumentStore
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters

_VECTORS_PER_CHUNK = 16_384
_BATCH = 64
_SEED = 0
_ENOUGH_RECALL = 0.999
_OTHER_SHARE = 0.3
_EF_SEARCH = (8, 16, 32, 64, 128, 256, 512, 1024)
_RESCORE_FACTORS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Setting:
    """Knobs of a search; 0 where the index has no such knob."""

    nprobe: int = 0
    ef_search: int = 0
    rescore_factor: int = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """What a setting gives: recall@n_docs from 0 to 1, latency of one question, questions a second in batches."""

    setting: Setting
    recall: float
    p50_ms: float
    p99_ms: float
    searches_per_s: float


def sampled_questions(store: DocumentStore, count: int) -> Float32Array:
    """Returns float32 [count, dim]: documents' embeddings, each drawn a little towards another document's.

    They lie where documents lie and are none of them. Real questions tell more, where there are some. Raises
    BuildError where there are no documents.
    """
    living = store.rows()
    if not len(living):
        raise BuildError("the index holds no documents to draw questions from")
    rng = np.random.default_rng(_SEED)
    rows = living[rng.integers(0, len(living), size=2 * count)]
    near, far = np.split(store.embeddings_of(rows.tolist()), 2)
    return np.asarray((1 - _OTHER_SHARE) * near + _OTHER_SHARE * far, dtype=np.float32)


def given_questions(file: Path, count: int) -> Float32Array:
    """Returns float32 [at most count, dim] of a JSONL corpus with embeddings. Raises BuildError."""
    records = list(itertools.islice(CorpusReader(file), count))
    given = [record.embedding for record in records if record.embedding is not None]
    if not given or len(given) < len(records) or len({len(vector) for vector in given}) > 1:
        raise BuildError(f"{file}: every question needs an embedding, all of one dimension")
    return np.stack(given)


def exact_rows(store: DocumentStore, questions: Float32Array, n_docs: int, metric: Metric) -> Int64Array:
    """Returns the rows int64 [questions, n_docs] nearest by the stored embeddings; memory holds a chunk."""
    best_rows = np.empty((len(questions), 0), dtype=np.int64)
    best = np.empty((len(questions), 0), dtype=np.float32)
    living = store.rows()
    for start in range(0, len(living), _VECTORS_PER_CHUNK):
        chunk = living[start : start + _VECTORS_PER_CHUNK]
        vectors = store.embeddings_of(chunk.tolist())
        rows = np.broadcast_to(chunk, (len(questions), len(chunk)))
        best_rows = np.concatenate([best_rows, rows], axis=1)
        best = np.concatenate([best, _nearness(questions, vectors, metric)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :n_docs]
        best_rows = np.take_along_axis(best_rows, order, axis=1)
        best = np.take_along_axis(best, order, axis=1)
    return best_rows


def tune(
    index: VectorIndex,
    store: DocumentStore,
    questions: Float32Array,
    n_docs: int,
    *,
    lossy: bool,
    progress: Callable[[Setting], None],
) -> list[Trial]:
    """Tries settings from the cheapest up, until one finds all but a thousandth.

    `lossy` says that the index's own scores are approximate, so that re-scoring more candidates by their stored
    embeddings can help. Raises BuildError where the questions do not fit the index.
    """
    if questions.ndim != 2 or questions.shape[1] != index.dimension or not len(questions):
        raise BuildError(
            f"questions {list(questions.shape)} do not fit an index of dimension {index.dimension}"
        )
    n_docs = min(n_docs, index.ntotal)
    exact = exact_rows(store, questions, n_docs, index.metric)
    trials: list[Trial] = []
    for knobs in _knobs(index):
        found = []
        for factor in _RESCORE_FACTORS if lossy else (1,):
            setting = Setting(knobs.nprobe, knobs.ef_search, factor)
            progress(setting)
            found.append(_trial(index, store, questions, exact, setting))
            if found[-1].recall >= _ENOUGH_RECALL or n_docs * factor >= index.ntotal:
                break
        trials += found
        if found[-1].recall >= _ENOUGH_RECALL:
            break
    return trials


def recommended(trials: list[Trial], target_recall: float) -> Trial:
    """Returns the fastest trial that reaches the recall; where none does, the one that comes nearest."""
    reaching = [trial for trial in trials if trial.recall >= target_recall]
    if reaching:
        return min(reaching, key=lambda trial: trial.p50_ms)
    return max(trials, key=lambda trial: (trial.recall, -trial.p50_ms))


def _knobs(index: VectorIndex) -> Iterator[SearchParameters]:
    """Yields values of the knobs that the index has, from the cheapest up."""
    probes = (1 << power for power in itertools.count())
    nprobes = list(itertools.takewhile(lambda value: _takes(index, SearchParameters(nprobe=value)), probes))
    searches = _EF_SEARCH if _takes(index, SearchParameters(ef_search=1)) else (0,)
    if nprobes:
        last = nprobes[-1]
        more = range(last + 1, 2 * last)
        nlist = last + bisect.bisect(more, False, key=lambda n: not _takes(index, SearchParameters(nprobe=n)))
        if nlist > last:
            nprobes.append(nlist)
        # An HNSW coarse quantizer is left as it was built: cells are few, and nprobe decides.
        yield from (SearchParameters(nprobe=value) for value in nprobes)
    else:
        yield from (SearchParameters(ef_search=value) for value in searches)


def _takes(index: VectorIndex, parameters: SearchParameters) -> bool:
    try:
        index.check_parameters(parameters)
    except InvalidSearchParametersError:
        return False
    return True


def _trial(
    index: VectorIndex, store: DocumentStore, questions: Float32Array, exact: Int64Array, setting: Setting
) -> Trial:
    n_docs = exact.shape[1]
    found, times_s = [], []
    for question in questions:
        began_s = time.perf_counter()
        found.append(_search(index, store, question[None], n_docs, setting)[0])
        times_s.append(time.perf_counter() - began_s)
    began_s = time.perf_counter()
    for start in range(0, len(questions), _BATCH):
        _search(index, store, questions[start : start + _BATCH], n_docs, setting)
    batches_s = time.perf_counter() - began_s
    hits = sum(len(np.intersect1d(rows, best)) for rows, best in zip(found, exact, strict=True))
    return Trial(
        setting,
        recall=hits / exact.size,
        p50_ms=1000 * float(np.quantile(times_s, 0.5)),
        p99_ms=1000 * float(np.quantile(times_s, 0.99)),
        searches_per_s=len(questions) / batches_s,
    )


def _search(
    index: VectorIndex, store: DocumentStore, questions: Float32Array, n_docs: int, setting: Setting
) -> list[Int64Array]:
    """Returns the rows of each question, re-scored as a request with this rescore_factor has them."""
    parameters = SearchParameters(nprobe=setting.nprobe, ef_search=setting.ef_search)
    rows, _ = index.search(questions, n_docs * setting.rescore_factor, parameters)
    # Without re-scoring, too, there may be more: the changes since an approximate snapshot (see LiveIndex).
    if rows.shape[1] <= n_docs:
        return list(rows)
    present = np.unique(rows[rows >= 0])
    vectors = store.embeddings_of(present.tolist())
    best = []
    for question, candidates in zip(questions, rows, strict=True):
        real = candidates[candidates >= 0]
        near = _nearness(question[None], vectors[np.searchsorted(present, real)], index.metric)[0]
        best.append(real[np.argsort(-near, kind="stable")[:n_docs]])
    return best


def _nearness(questions: Float32Array, vectors: Float32Array, metric: Metric) -> Float32Array:
    """Returns float32 [questions, vectors], more the nearer; for L2 without the question's own square."""
    products = questions @ vectors.T
    if metric is Metric.INNER_PRODUCT:
        return products
    return np.asarray(2 * products - np.square(vectors).sum(axis=1), dtype=np.float32)
