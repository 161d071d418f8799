"""faiss behind the contract of a vector index: build by factory string, load, search."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.factory_tools import reverse_index_factory

from retriever_service.errors import BuildError, DamagedIndexError, InvalidSearchParametersError
from retriever_service.index.base import VectorIndex
from retriever_service.index.faiss_parts import (
    find_part,
    has_exact_scores,
    is_exhaustive,
    names_rows,
    order_no_codes,
    reason_of,
    search_parameters,
    set_knobs,
    takes_selector,
)
from retriever_service.index.fallback import IndexFallback
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters, Selection

logger = logging.getLogger(__name__)

# The names that SWIG generates have no types.
_faiss: Any = faiss
_reverse_index_factory: Any = reverse_index_factory
# A search of fewer questions than threads divides an index's vectors among the threads, by a multiplication that takes
# one of them about four times as long as to compare the questions with all vectors: fewer threads had better not.
_DIVIDES_WELL_FROM_THREADS = 4
_FAISS_MULTIPLIES_FROM = 128_000
_MULTIPLY_FROM = 3072
"""Questions times dimension, for each thread: from there on faiss finds more a second by multiplying matrices."""
_LEAST_HNSW_M = 2  # with fewer neighbours faiss ends the process
_FAISS_METRICS = {Metric.INNER_PRODUCT: faiss.METRIC_INNER_PRODUCT, Metric.L2: faiss.METRIC_L2}


class FaissIndex(VectorIndex):
    """An immutable faiss index on the CPU, in memory or mapped from its file."""

    # Set by whoever would have put it on GPUs: see VectorIndex.
    fallback: IndexFallback | None = None

    def __init__(self, index: Any) -> None:
        """Takes a trained faiss index. Raises ValueError for a metric other than inner product and L2."""
        metrics = {number: metric for metric, number in _FAISS_METRICS.items()}
        if index.metric_type not in metrics:
            raise ValueError(f"metric {index.metric_type} is neither inner product nor L2")
        self._index = index
        self._metric = metrics[index.metric_type]
        self._ivf = find_part(index, faiss.IndexIVF)
        self._hnsw = find_part(index, faiss.IndexHNSW)
        self._takes_selection = takes_selector(index)
        # Asked for at every search; walking the index's parts costs waits for the interpreter's lock.
        self._has_exact_scores = has_exact_scores(index)
        self._is_exhaustive = is_exhaustive(index)

    @classmethod
    def load(cls, file: Path, *, memory_map: bool = False) -> "FaissIndex":
        """Reads an index file, or maps it: pages come as searches touch them and are shared between processes.

        A kind that faiss cannot map is read, and the log says so. Nothing may ever be added to a mapped index.
        Raises DamagedIndexError naming a file that faiss cannot read.
        """
        if memory_map:
            try:
                return cls(faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC))
            except (RuntimeError, ValueError) as error:
                logger.warning(
                    "faiss cannot map this index: reading it into memory",
                    extra={"file": str(file), "reason": reason_of(error)},
                )
        try:
            return cls(faiss.read_index(str(file)))
        except (RuntimeError, ValueError) as error:
            raise DamagedIndexError(file, f"faiss cannot read it: {reason_of(error)}") from error

    @property
    def faiss_index(self) -> Any:
        """faiss's own object, never to be changed."""
        return self._index

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._index.d)

    @property
    def metric(self) -> Metric:
        """Similarity of the search."""
        return self._metric

    @property
    def has_exact_scores(self) -> bool:
        """Whether the index keeps vectors whole: see VectorIndex."""
        return self._has_exact_scores

    @property
    def is_exhaustive(self) -> bool:
        """Whether every search is exact: see VectorIndex."""
        return self._is_exhaustive

    @property
    def takes_selection(self) -> bool:
        """Whether faiss can leave rows out on this kind: see VectorIndex."""
        return self._takes_selection

    def kind(self) -> str:
        """The faiss factory string that describes this index, or its class where faiss has none."""
        try:
            return str(_reverse_index_factory(self._index))
        except NotImplementedError:
            return type(faiss.downcast_index(self._index)).__name__

    def settings(self) -> dict[str, int]:
        """The index's own nprobe and ef_search: see VectorIndex."""
        return {
            "nprobe": 1 if self._ivf is None else int(self._ivf.nprobe),
            "ef_search": 1 if self._hnsw is None else int(self._hnsw.hnsw.efSearch),
        }

    def names_rows(self) -> bool:
        """Whether its vectors have the ids 0 … ntotal - 1, as a store's rows: another's may have others."""
        return names_rows(self._index)

    def save(self, file: Path, *, nprobe: int | None, ef_search: int | None) -> None:
        """Writes the index, which nobody searches yet, with these as its own settings of the knobs it has.

        None leaves a knob as it is. Raises OSError.
        """
        set_knobs(self._index, nprobe, ef_search)
        _write(self._index, file)

    def check_parameters(self, parameters: SearchParameters) -> None:
        """Raises InvalidSearchParametersError: see VectorIndex."""
        for knob, owner in (("nprobe", self._ivf), ("ef_search", self._hnsw)):
            value = getattr(parameters, knob)
            if value < 0:
                raise InvalidSearchParametersError(f"search_parameters.{knob}", "must not be negative", value)
            if value and owner is None:
                raise InvalidSearchParametersError(
                    f"search_parameters.{knob}", f"an index of kind {self.kind()} has no such knob", value
                )
        if self._ivf is not None and parameters.nprobe > self._ivf.nlist:
            raise InvalidSearchParametersError(
                "search_parameters.nprobe", f"must be at most nlist, {self._ivf.nlist}", parameters.nprobe
            )

    def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """Finds the rows nearest to each vector: see VectorIndex."""
        self.check_vectors(vectors, n_docs)
        n_docs = min(n_docs, self.ntotal if selection is None else len(selection))
        if n_docs == 0:
            return np.empty((len(vectors), 0), np.int64), np.empty((len(vectors), 0), np.float32)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        bitmap = None if selection is None else selection.bitmap(self.ntotal)
        selector = None if bitmap is None else _faiss.IDSelectorBitmap(bitmap)
        faiss_parameters = search_parameters(self._index, parameters, selector)
        with self._threads_for(len(vectors)):
            scores, rows = self._index.search(vectors, n_docs, params=faiss_parameters)
        return rows, scores

    @contextlib.contextmanager
    def _threads_for(self, num_questions: int) -> Iterator[None]:
        """Takes no more threads than questions where the index is compared with whole, and threads are few."""
        threads = default_num_threads()
        if not self._is_exhaustive or not num_questions < threads < _DIVIDES_WELL_FROM_THREADS:
            yield
            return
        set_num_threads(num_questions)
        try:
            yield
        finally:
            set_num_threads(threads)


class FaissBuilder:
    """Builds a faiss index: train once on a sample, then add every vector in row order."""

    def __init__(self, kind: str, dimension: int, metric: Metric) -> None:
        """Takes a factory string such as "IVF256,PQ16". Raises BuildError where faiss refuses it, or should."""
        if any(int(given) < _LEAST_HNSW_M for given in re.findall(r"HNSW(\d+)", kind)):
            raise BuildError(f"kind {kind!r}: HNSW needs an M of at least {_LEAST_HNSW_M}")
        try:
            self._index = faiss.index_factory(dimension, kind, _FAISS_METRICS[metric])
        except RuntimeError as error:
            raise BuildError(
                f"faiss refuses kind {kind!r} at dimension {dimension}: {reason_of(error)}"
            ) from error
        ivf = find_part(self._index, faiss.IndexIVF)
        if ivf is not None and ivf.nlist < 1:
            raise BuildError(f"kind {kind!r}: IVF needs at least one cell")
        order_no_codes(self._index)
        self._kind = kind
        self._index.verbose = False

    def resume(self, file: Path) -> None:
        """Goes on from what `checkpoint` wrote, as if there had been no break. Raises DamagedIndexError."""
        try:
            self._index = faiss.read_index(str(file))
        except (RuntimeError, ValueError) as error:
            raise DamagedIndexError(file, f"faiss cannot read it: {reason_of(error)}") from error
        graph = find_part(self._index, faiss.IndexHNSW)
        if graph is not None and graph.ntotal == self.ntotal:
            # The file does not hold the generator that draws the levels of the vectors still to come.
            for _ in range(self.ntotal):
                graph.hnsw.random_level()

    def checkpoint(self, file: Path) -> None:
        """Writes what there is so far: training, and the vectors added. Making it durable is the caller's part."""
        _write(self._index, file)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._index.d)

    @property
    def ntotal(self) -> int:
        """Vectors added so far."""
        return int(self._index.ntotal)

    @property
    def needs_training(self) -> bool:
        """Whether `train` must come before `add`."""
        return not self._index.is_trained

    @property
    def num_training_vectors(self) -> int:
        """Vectors that training profits from: 256 for each centroid it must learn, at least 65,536."""
        ivf = find_part(self._index, faiss.IndexIVF)
        return max(65_536, 256 * int(ivf.nlist) if ivf is not None else 0)

    def train(self, vectors: Float32Array) -> None:
        """Learns centroids and codebooks from float32 [n, dimension]. Raises BuildError on too few."""
        try:
            self._index.train(vectors)
        except RuntimeError as error:
            raise BuildError(
                f"kind {self._kind!r} cannot be trained on {len(vectors)} vectors: {reason_of(error)}"
            ) from error

    def add(self, vectors: Float32Array) -> None:
        """Appends float32 [n, dimension] at the next rows. Raises BuildError where the kind cannot."""
        try:
            self._index.add(vectors)
        except RuntimeError as error:
            raise BuildError(
                f"kind {self._kind!r} takes no vectors after the first {self.ntotal}: {reason_of(error)}"
            ) from error

    def save(self, file: Path, *, nprobe: int, ef_search: int) -> None:
        """Writes the index file with these as its own settings of the knobs it has."""
        set_knobs(self._index, nprobe, ef_search)
        _write(self._index, file)


def _write(index: faiss.Index, file: Path) -> None:
    """Writes an index file. Raises OSError; faiss's own writer says nothing where the last bytes find no room."""
    failed: list[OSError] = []
    with file.open("wb") as stream:

        def write(content: bytes) -> None:
            if not failed:
                try:
                    stream.write(content)
                except OSError as error:
                    # Through faiss it would come back as another error.
                    failed.append(error)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))  # type: ignore[attr-defined]  # not in its stubs
        if failed:
            raise failed[0]


def default_num_threads() -> int:
    """Returns how many threads faiss uses for the searches of the calling thread."""
    return int(faiss.omp_get_max_threads())


def set_num_threads(num_threads: int) -> None:
    """Sets how many threads faiss uses for the searches of the calling thread."""
    faiss.omp_set_num_threads(num_threads)


def ask_nobody_to_stop() -> None:
    """Has faiss go through every search without asking Python whether to stop, in the whole process.

    It asks between the questions of a search, holding the interpreter's lock, which takes longer than the search where
    others run; and only the main thread would ever learn of a signal.
    """
    _faiss.InterruptCallback.clear_instance()


def multiply_batches(num_threads: int) -> None:
    """Has faiss multiply matrices for batches of fewer questions than it would by itself, in the whole process.

    With few threads a product of matrices finds several times as much a second, from some 16 questions on; faiss
    begins at 333 of 384 dimensions, which suits some 40 threads. Products come in larger blocks, between which
    threads wait for each other, within the memory that faiss takes by itself.
    """
    _faiss.cvar.distance_compute_blas_threshold = min(_FAISS_MULTIPLIES_FROM, _MULTIPLY_FROM * num_threads)
    if num_threads > 1:
        _faiss.cvar.distance_compute_blas_query_bs = 1024
        _faiss.cvar.distance_compute_blas_database_bs = 4096


def normalized_kind(kind: str) -> str:
    """Returns the factory string with the usual small names put in faiss's spelling ("flat", "hnsw32")."""
    spelled = {"flat": "Flat", "hnsw": "HNSW32"}
    upper = kind.upper()
    return spelled.get(kind.lower(), upper if upper.startswith("HNSW") and "," not in kind else kind)
