"""An index on GPUs with the CPU's beside it, which answers what the GPUs cannot."""

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.fallback import IndexFallback, SearchFallback
from retriever_service.index.gpu.copy import GpuCopy, GpuOptions, becomes_cagra
from retriever_service.index.gpu.device import GpuError
from retriever_service.index.index_over import IndexOver
from retriever_service.types import Float32Array, Int64Array, SearchParameters, Selection

logger = logging.getLogger(__name__)

# The most that every build of faiss selects on a GPU.
_MAX_CANDIDATES = 1024
# A selection that leaves more out than this share is the CPU's: too many candidates would be fetched for nothing.
_MAX_LEFT_OUT = 1 / 8


class GpuIndex(IndexOver):
    """Searches whichever copy has least to do.

    GPUs are never told which rows they may find. Where a selection leaves few rows out (those hidden by
    changes), more candidates are fetched and the rows left out are dropped; a batch that is left with too few
    is searched again on the CPU. Everything else that a GPU cannot do, a search that faiss refuses or finds no
    memory for among it, is the CPU's too: an answer may come later for it, but it comes.
    """

    def __init__(
        self,
        cpu: FaissIndex,
        options: GpuOptions,
        *,
        parallel_searches: int,
        left: Callable[["GpuIndex"], None],
        fell_back: Callable[[SearchFallback], None],
    ) -> None:
        """Has no copies yet: see `put`. `parallel_searches` is how many there may be.

        `left` hears of the end, `fell_back` of each search that the CPU answers though there are copies.
        """
        super().__init__(cpu)
        self.cpu = cpu
        self._options = options
        self._parallel_searches = parallel_searches
        self._left = left
        self._fell_back = fell_back
        self._is_cagra = becomes_cagra(cpu.faiss_index, options)
        self._choosing = threading.Lock()
        self._copies: tuple[GpuCopy, ...] = ()
        self.is_closed = False
        self._has_warned = False

    @property
    def has_exact_scores(self) -> bool:
        """As the CPU's, but for float16: see VectorIndex."""
        return self.cpu.has_exact_scores and not self._options.float16

    @property
    def is_exhaustive(self) -> bool:
        """As the CPU's, but for float16 and CAGRA: see VectorIndex."""
        return self.cpu.is_exhaustive and not self._options.float16 and not self._is_cagra

    @property
    def devices(self) -> tuple[str, ...]:
        """The GPUs that hold it, or the CPU while none does."""
        return tuple(name for copy in self._copies for name in copy.names) or self.cpu.devices

    @property
    def fallback(self) -> IndexFallback | None:
        """Says so where no GPU would take a copy: see VectorIndex."""
        return None if self._copies else IndexFallback.COPY_FAILED

    @property
    def parallel_searches(self) -> int:
        """One for each copy that there may be."""
        return self._parallel_searches

    def put(self, copies: Sequence[GpuCopy]) -> None:
        """Searches go to these from now on; frees them where the index was closed meanwhile."""
        with self._choosing:
            if not self.is_closed:
                self._copies = tuple(copies)
                return
        for copy in copies:
            copy.free()

    def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """Finds the rows nearest to each vector: see VectorIndex."""
        self.cpu.check_vectors(vectors, n_docs)
        found = self._search_copy(vectors, n_docs, parameters, selection)
        return self.cpu.search(vectors, n_docs, parameters, selection) if found is None else found

    def close(self) -> None:
        """Frees the GPUs; the CPU's index goes on answering what still comes."""
        with self._choosing:
            copies, self._copies, self.is_closed = self._copies, (), True
        for copy in copies:
            copy.free()
        self._left(self)

    def _search_copy(
        self, vectors: Float32Array, n_docs: int, parameters: SearchParameters, selection: Selection | None
    ) -> tuple[Int64Array, Float32Array] | None:
        """Returns what a copy finds; None where the CPU must answer."""
        left_out = 0 if selection is None else self.ntotal - len(selection)
        n_docs = min(n_docs, self.ntotal - left_out)
        num_candidates = min(n_docs + left_out, 2 * n_docs + 32)
        if n_docs == 0 or not self._copies:
            return None
        if left_out > _MAX_LEFT_OUT * self.ntotal:
            self._fell_back(SearchFallback.SELECTION)
            return None
        if num_candidates > _MAX_CANDIDATES:
            self._fell_back(SearchFallback.CANDIDATES)
            return None
        copy = self._least_busy()
        if copy is None:
            return None
        try:
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
            rows, scores = copy.search(vectors, num_candidates if left_out else n_docs, parameters)
        except GpuError as error:
            self._warn(copy, error)
            self._fell_back(SearchFallback.FAILED)
            return None
        finally:
            with self._choosing:
                copy.searches -= 1
        if selection is None:
            return rows, scores
        found = _chosen(rows, scores, n_docs, selection, self.ntotal)
        if found is None:
            self._fell_back(SearchFallback.TOO_FEW_LEFT)
        return found

    def _least_busy(self) -> GpuCopy | None:
        with self._choosing:
            copy = min(self._copies, key=lambda one: one.searches, default=None)
            if copy is not None:
                copy.searches += 1
            return copy

    def _warn(self, copy: GpuCopy, error: GpuError) -> None:
        """Once: what a GPU cannot do now it often cannot do a thousand times."""
        if not self._has_warned and not self.is_closed:
            self._has_warned = True
            logger.warning(
                "a search on %s failed, the CPU answers (said once an index): kind %s: %s",
                ",".join(copy.names),
                self.cpu.kind(),
                error,
            )


def _chosen(
    rows: Int64Array, scores: Float32Array, n_docs: int, selection: Selection, ntotal: int
) -> tuple[Int64Array, Float32Array] | None:
    """Returns the n_docs best of the selection; None where more of it may stand behind the candidates."""
    bitmap = selection.bitmap(ntotal)
    found = np.maximum(rows, 0)
    chosen = (rows >= 0) & ((bitmap[found >> 3] >> (found & 7).astype(np.uint8)) & 1).astype(np.bool_)
    if ((chosen.sum(axis=1) < n_docs) & (rows >= 0).all(axis=1)).any():
        return None
    order = np.argsort(~chosen, axis=1, kind="stable")[:, :n_docs]
    rows = np.where(chosen, rows, -1)
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
