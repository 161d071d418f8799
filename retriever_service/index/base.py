"""The contract of a vector index."""

from abc import ABC, abstractmethod

from retriever_service.index.fallback import IndexFallback
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters, Selection


class VectorIndex(ABC):
    """An immutable index of `ntotal` vectors of `dimension` float32 numbers; row r is the store's row r.

    What an implementation promises:

    - `search` never changes the index, may be called from many threads at once, and releases the GIL
      while it searches; knobs of one call never leak into another.
    - Rows come best first by the index's own, possibly approximate, score. Who needs exact scores computes
      them from the stored embeddings.
    - A missing hit is row -1 and stands after the real ones; a row is never returned twice for a question.
    - A batch gives the rows that its questions give alone, but for ties within rounding.
    """

    @property
    @abstractmethod
    def ntotal(self) -> int:
        """Number of vectors."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Numbers in a vector."""

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """Similarity of the search."""

    @property
    def has_exact_scores(self) -> bool:
        """Whether scores are those of the vectors themselves: re-scoring more candidates then gains nothing."""
        return False

    @property
    def is_exhaustive(self) -> bool:
        """Whether every search compares with every vector, so that there is no recall to lose."""
        return False

    @property
    def measures_recall(self) -> bool:
        """Whether `measured_recall` tells the recall of answers; else it takes the stored embeddings to."""
        return False

    def measured_recall(
        self,
        vector: Float32Array,
        n_docs: int,
        rows: Int64Array,
        selection: Selection | None,
    ) -> float | None:
        """Returns a sample of the recall of `rows` int64 [n_docs], found for `vector` float32 [1, dimension].

        None where this sample says nothing. Only where `measures_recall`.
        """
        raise NotImplementedError

    @property
    def takes_selection(self) -> bool:
        """Whether `search` can be told which rows it may find."""
        return False

    def living(self, selection: Selection) -> Int64Array:
        """Returns the rows int64, ascending, of a selection that lists its rows, which a search finds now."""
        return selection.rows

    @property
    def devices(self) -> tuple[str, ...]:
        """Where searches run: "cpu", or GPUs such as "cuda:0"; empty where a cluster searches."""
        return ("cpu",)

    @property
    def fallback(self) -> IndexFallback | None:
        """Why it is on the CPU where it was to be on GPUs; None where it is where it was to be."""
        return None

    @property
    def parallel_searches(self) -> int:
        """Searches that gain from running at once; it never changes."""
        return 1

    def settings(self) -> dict[str, int]:
        """Returns the index's own nprobe and ef_search; 1 where its kind has no such knob."""
        return {"nprobe": 1, "ef_search": 1}

    @abstractmethod
    def check_parameters(self, parameters: SearchParameters) -> None:
        """Raises InvalidSearchParametersError where a knob does not exist on this kind or is out of range."""

    def check_vectors(self, vectors: Float32Array, n_docs: int) -> None:
        """Raises ValueError for vectors of another shape, or no documents."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or len(vectors) == 0 or n_docs < 1:
            raise ValueError(
                f"cannot search {n_docs} of vectors {vectors.shape} in dimension {self.dimension}"
            )

    @abstractmethod
    def search(
        self,
        vectors: Float32Array,
        n_docs: int,
        parameters: SearchParameters,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """Finds the rows nearest to each vector.

        `vectors` is float32 [batch, dimension], finite, batch at least 1; `n_docs` is at least 1 and
        `parameters` has passed `check_parameters`. Only rows of `selection` are found where one is given, which
        needs `takes_selection`. Returns rows int64 and scores float32, both [batch, min(n_docs, rows there
        are)]. Raises ValueError for other shapes.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to give back)
        """Gives back what lies outside of this process's memory."""
