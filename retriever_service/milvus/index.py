"""Milvus behind the contract of a vector index."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from retriever_service.errors import InvalidSearchParametersError
from retriever_service.index.base import VectorIndex
from retriever_service.index.manifest import Manifest
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.schema import index_parameters
from retriever_service.milvus.state import Shown
from retriever_service.recall import random_part, recall_in_part
from retriever_service.types import Float32Array, Int64Array, Metric, SearchParameters, Selection

_MAX_HITS = 16_384  # Milvus finds no more of a question
_WIDEST_EF = 1024  # of a search that should miss nothing
# It compares one by one where a filter leaves less than a fifteenth of an HNSW index: there its search is exact.
_LARGEST_SHARE = 16
_MOST_ROWS = 1_000_000


class Matching(Selection):
    """The documents that meet an expression: no rows are listed, Milvus evaluates it in the search."""

    def __init__(self, expression: str) -> None:
        super().__init__(np.empty(0, np.int64))
        self.expression = expression

    def __len__(self) -> int:
        """More than any limit under which rows are compared one by one."""
        return sys.maxsize


class MilvusIndex(VectorIndex):
    """Searches one collection. Selections are those of its store, or short lists of rows."""

    def __init__(
        self,
        connection: MilvusConnection,
        collection: str,
        manifest: Manifest,
        shown: Shown,
        *,
        nprobe: int,
        ef_search: int,
    ) -> None:
        self._connection = connection
        self._collection = collection
        self._manifest = manifest
        self._shown = shown
        self._type, parameters = index_parameters(manifest.kind)
        self._nlist = parameters.get("nlist", 0)
        self._chance = random.Random()  # noqa: S311  (a sample is no secret)
        self._own = SearchParameters(nprobe=nprobe, ef_search=ef_search)

    @property
    def ntotal(self) -> int:
        """Vectors that can be found."""
        return self._shown.state.num_documents

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self._manifest.dimension

    @property
    def metric(self) -> Metric:
        """Similarity of the search."""
        return self._manifest.metric

    @property
    def devices(self) -> tuple[str, ...]:
        """None of this machine's: the cluster knows."""
        return ()

    @property
    def has_exact_scores(self) -> bool:
        """Whether the index keeps vectors whole: see VectorIndex."""
        return self._type in {"FLAT", "HNSW", "IVF_FLAT"}

    @property
    def is_exhaustive(self) -> bool:
        """Whether every search is exact: see VectorIndex."""
        return self._type == "FLAT"

    @property
    def measures_recall(self) -> bool:
        """By a search of Milvus' own: to read all vectors would take them through the network."""
        return True

    @property
    def takes_selection(self) -> bool:
        """Milvus evaluates any selection before it searches."""
        return True

    def check_parameters(self, parameters: SearchParameters) -> None:
        """Raises InvalidSearchParametersError: see VectorIndex."""
        for knob, there in (("nprobe", bool(self._nlist)), ("ef_search", self._type == "HNSW")):
            value = getattr(parameters, knob)
            if value < 0:
                raise InvalidSearchParametersError(f"search_parameters.{knob}", "must not be negative", value)
            if value and not there:
                raise InvalidSearchParametersError(
                    f"search_parameters.{knob}",
                    f"an index of kind {self._manifest.kind} has no such knob",
                    value,
                )
        if parameters.nprobe > self._nlist:
            raise InvalidSearchParametersError(
                "search_parameters.nprobe", f"must be at most nlist, {self._nlist}", parameters.nprobe
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
        state = self._shown.state
        n_docs = min(n_docs, state.num_documents, _MAX_HITS)
        rows = np.full((len(vectors), n_docs), -1, dtype=np.int64)
        scores = np.zeros((len(vectors), n_docs), dtype=np.float32)
        if n_docs == 0:
            return rows, scores
        hits = self._connection.search(
            self._collection,
            np.ascontiguousarray(vectors, dtype=np.float32),
            at=state.timestamp,
            limit=n_docs,
            filter=_both(state.expression(), selection),
            output_fields=["row"],
            search_params={"params": self._knobs(parameters, n_docs)},
        )
        for question, found in enumerate(hits):
            for place, hit in enumerate(found):
                rows[question, place] = hit["entity"]["row"]
                scores[question, place] = hit["distance"]
        return rows, scores

    def measured_recall(
        self, vector: Float32Array, n_docs: int, rows: Int64Array, selection: Selection | None
    ) -> float | None:
        """Compares the answer with an exact search in a part of the documents: see VectorIndex and recall_in_part."""
        state = self._shown.state
        found = [row for row in rows.tolist() if row >= 0]
        if not found or not all(state.shows(row) for row in found):
            return None
        size = min(_MOST_ROWS, state.next_row // _LARGEST_SHARE)
        part = " or ".join(
            f"(row >= {some.start} and row < {some.stop})"
            for some in random_part(state.next_row, size, self._chance)
        )
        hits = self._connection.search(
            self._collection,
            np.ascontiguousarray(vector, dtype=np.float32),
            at=state.timestamp,
            limit=n_docs if self.has_exact_scores else 4 * n_docs,
            filter=f"{_both(state.expression(), selection)} and ({part})",
            output_fields=["row", "embedding"],
            search_params={"params": self._widest(n_docs)},
        )
        near = {int(hit["entity"]["row"]): _vector(hit["entity"]) for hit in hits[0]}
        answer = self._connection.query(
            self._collection, f"row in {found}", ["row", "embedding"], at=state.timestamp
        )
        return recall_in_part(
            vector, n_docs, {int(one["row"]): _vector(one) for one in answer}, near, self.metric
        )

    def _widest(self, n_docs: int) -> dict[str, int]:
        if self._nlist:
            return {"nprobe": self._nlist}
        return {"ef": max(_WIDEST_EF, 4 * n_docs)} if self._type == "HNSW" else {}

    def _knobs(self, parameters: SearchParameters, n_docs: int) -> dict[str, int]:
        if self._nlist:
            return {"nprobe": min(parameters.nprobe or self._own.nprobe, self._nlist)}
        if self._type == "HNSW":
            return {"ef": max(parameters.ef_search or self._own.ef_search, n_docs)}
        return {}


def _both(visible: str, selection: Selection | None) -> str:
    if selection is None:
        return visible
    if isinstance(selection, Matching):
        return f"{visible} and {selection.expression}"
    return f"{visible} and row in {selection.rows.tolist()}"


def _vector(entity: Mapping[str, Any]) -> Float32Array:
    return np.asarray(entity["embedding"], dtype=np.float32)
