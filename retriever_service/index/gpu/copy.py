"""A copy of a faiss index on a GPU, or in shards on several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss

from retriever_service.index.faiss_parts import reason_of
from retriever_service.index.gpu.device import GpuDevice, GpuError
from retriever_service.types import Float32Array, Int64Array, SearchParameters

# The names that SWIG generates have no types, and those of the GPU are not in every build.
_faiss: Any = faiss

# By class and not by asking faiss: it takes what derives from these for the class itself, and would lose what a
# derived one adds (IndexIVFPQR's second codes) or misread how it lays out its lists.
_MOVABLE = (
    faiss.IndexFlat,
    faiss.IndexFlatIP,
    faiss.IndexFlatL2,
    faiss.IndexIVFFlat,
    faiss.IndexIVFPQ,
    faiss.IndexIVFScalarQuantizer,
    faiss.IndexScalarQuantizer,
)
_FLAT = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2)
_ITOPK_SIZE = 64  # faiss's own


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """How an index is put on GPUs: a copy on each, or, with `sharding`, a part of one copy on each.

    With `float16`, Flat keeps its vectors, and IVF,PQ its look-up tables, in float16. With `cagra`, a CAGRA
    graph is built of the vectors of a Flat or HNSW index.
    """

    sharding: bool = False
    float16: bool = False
    cagra: bool = False


class GpuCopy:
    """Lives on `devices`; the first one's thread makes, searches and frees it."""

    def __init__(self, devices: Sequence[GpuDevice], index: Any, options: GpuOptions) -> None:
        """Copies a CPU index. Raises GpuError with faiss's reason, out of memory among them."""
        self.names = tuple(device.name for device in devices)
        self.searches = 0
        self._owner = devices[0]
        self._source = faiss.downcast_index(index)
        self._is_cagra = becomes_cagra(self._source, options)
        self._index: Any = None
        others = [device.run(lambda resources: resources) for device in devices[1:]]

        def make(resources: Any) -> None:
            numbers = [device.number for device in devices]
            self._index = self._made([resources, *others], numbers, options)

        try:
            self._owner.run(make)
        except (RuntimeError, MemoryError) as error:
            raise GpuError(reason_of(error)) from error

    def search(
        self, vectors: Float32Array, n_docs: int, parameters: SearchParameters
    ) -> tuple[Int64Array, Float32Array]:
        """Finds the rows nearest to float32 [batch, dim]: see VectorIndex. Raises GpuError where faiss cannot."""

        def work(resources: Any) -> tuple[Int64Array, Float32Array]:  # noqa: ARG001  (held by the index)
            if self._index is None:
                raise GpuError("the index has just been freed")
            scores, rows = self._index.search(vectors, n_docs, params=self._parameters(n_docs, parameters))
            return rows, scores

        try:
            return self._owner.run(work)
        except (RuntimeError, MemoryError) as error:
            raise GpuError(reason_of(error)) from error

    def free(self) -> None:
        """Gives the GPU's memory back once the searches that were begun are through."""

        def work(resources: Any) -> None:  # noqa: ARG001  (held by the index)
            self._index = None

        self._owner.run(work)

    def _made(self, resources: list[Any], numbers: list[int], options: GpuOptions) -> Any:
        if self._is_cagra:
            return _cagra(self._source, resources[0], numbers[0])
        if len(numbers) == 1:
            cloner_options = _faiss.GpuClonerOptions()
            cloner_options.useFloat16 = options.float16
            return _faiss.index_cpu_to_gpu(resources[0], numbers[0], self._source, cloner_options)
        multiple_options = _faiss.GpuMultipleClonerOptions()
        multiple_options.useFloat16 = options.float16
        multiple_options.shard = True
        return _faiss.index_cpu_to_gpu_multiple_py(resources, self._source, multiple_options, numbers)

    def _parameters(self, n_docs: int, parameters: SearchParameters) -> Any:
        if self._is_cagra:
            own = self._source.hnsw.efSearch if isinstance(self._source, faiss.IndexHNSW) else _ITOPK_SIZE
            width = max(parameters.ef_search or own, n_docs)
            return _faiss.SearchParametersCagra(itopk_size=width)
        return _ivf_parameters(self._source, parameters) if parameters.nprobe else None


def becomes_cagra(index: Any, options: GpuOptions) -> bool:
    """Whether this index is a CAGRA graph once it is on a GPU."""
    index = faiss.downcast_index(index)
    return (options.cagra or isinstance(index, _faiss.IndexHNSWCagra)) and _flat_vectors(index) is not None


def check_movable(index: Any, options: GpuOptions) -> None:
    """Raises GpuError where faiss has nothing on GPUs for this kind of index."""
    index = faiss.downcast_index(index)
    if becomes_cagra(index, options):
        if not hasattr(_faiss, "GpuIndexCagra"):
            raise GpuError("CAGRA needs faiss with cuVS: install ragpair[cuvs] in place of ragpair[gpu]")
        if options.sharding:
            raise GpuError("CAGRA cannot be split over GPUs: leave --index-gpu-sharding out")
        return
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    # Faiss does not split a flat scalar quantizer: what it gives in its place is on the CPU.
    is_unsplittable = options.sharding and isinstance(index, faiss.IndexScalarQuantizer)
    if type(index) not in _MOVABLE or is_unsplittable:
        raise GpuError(f"faiss has no {type(index).__name__} on GPUs")


def _flat_vectors(index: Any) -> Any:
    """The Flat index that holds the vectors of a Flat or HNSW index; None where there are only codes."""
    index = faiss.downcast_index(index)
    if type(index) in _FLAT:
        return index
    return _flat_vectors(index.storage) if isinstance(index, faiss.IndexHNSW) else None


def _cagra(source: Any, resources: Any, number: int) -> Any:
    config = _faiss.GpuIndexCagraConfig()
    config.device = number
    index = _faiss.GpuIndexCagra(resources, source.d, source.metric_type, config)
    if isinstance(source, _faiss.IndexHNSWCagra):
        index.copyFrom(source)
        return index
    flat = _flat_vectors(source)
    # A view, not a copy: cuVS reads the vectors where they are, and the CPU's index outlives this one.
    vectors = _faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    index.train(vectors)
    return index


def _ivf_parameters(source: Any, parameters: SearchParameters) -> Any:
    source = faiss.downcast_index(source)
    if isinstance(source, faiss.IndexPreTransform):
        inner = _ivf_parameters(source.index, parameters)
        return _faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(source, faiss.IndexIDMap):
        return _ivf_parameters(source.index, parameters)
    return _faiss.SearchParametersIVF(nprobe=parameters.nprobe)
