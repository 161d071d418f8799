"""What an index that stands over another one answers by it."""

from retriever_service.index.base import VectorIndex
from retriever_service.index.fallback import IndexFallback
from retriever_service.types import Metric, SearchParameters


class IndexOver(VectorIndex):
    """Answers as the index below it does; a subclass searches, and says where it differs."""

    def __init__(self, below: VectorIndex) -> None:
        self._below = below

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return self._below.ntotal

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self._below.dimension

    @property
    def metric(self) -> Metric:
        """Similarity of the search."""
        return self._below.metric

    @property
    def has_exact_scores(self) -> bool:
        """As below: see VectorIndex."""
        return self._below.has_exact_scores

    @property
    def is_exhaustive(self) -> bool:
        """As below: see VectorIndex."""
        return self._below.is_exhaustive

    @property
    def takes_selection(self) -> bool:
        """As below: see VectorIndex."""
        return self._below.takes_selection

    @property
    def devices(self) -> tuple[str, ...]:
        """As below: see VectorIndex."""
        return self._below.devices

    @property
    def fallback(self) -> IndexFallback | None:
        """As below: see VectorIndex."""
        return self._below.fallback

    @property
    def parallel_searches(self) -> int:
        """As below: see VectorIndex."""
        return self._below.parallel_searches

    def settings(self) -> dict[str, int]:
        """As below: see VectorIndex."""
        return self._below.settings()

    def check_parameters(self, parameters: SearchParameters) -> None:
        """As below: see VectorIndex."""
        self._below.check_parameters(parameters)

    def close(self) -> None:
        """Closes the index below: see VectorIndex."""
        self._below.close()
