"""faiss's functions for GPUs, played on CPU indexes: for machines, and builds of faiss, that have no GPU."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from retriever_service.index.gpu import copy, device


@dataclass(frozen=True, slots=True)
class Search:
    """One search of a fake index."""

    device: int
    batch: int
    n_docs: int
    params: Any


@dataclass
class FakeGpus:
    """Stands in for the module faiss; what it has no GPU name for is faiss's own."""

    num_gpus: int = 2
    vectors_that_fit: int = 1_000_000_000
    searches: list[Search] = field(default_factory=list)
    threads: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    on_device: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    options: list[Any] = field(default_factory=list)
    temp_memory: list[int] = field(default_factory=list)
    search_error: Exception | None = None
    meeting: threading.Barrier | None = None
    # What faiss with cuVS has in addition.
    has_cuvs: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeGpus":
        monkeypatch.setattr(device, "_faiss", self)
        monkeypatch.setattr(copy, "_faiss", self)
        return self

    def __getattr__(self, name: str) -> Any:
        cagra = {
            "GpuIndexCagraConfig": SimpleNamespace,
            "GpuIndexCagra": self._cagra,
            "SearchParametersCagra": SimpleNamespace,
        }
        if name in cagra:
            if not self.has_cuvs:
                raise AttributeError(name)
            return cagra[name]
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return self.num_gpus

    def StandardGpuResources(self) -> Any:  # noqa: N802  (faiss's name)
        return SimpleNamespace(setTempMemory=self.temp_memory.append)

    def GpuClonerOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(useFloat16=False)

    def GpuMultipleClonerOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(useFloat16=False, shard=False)

    def index_cpu_to_gpu(self, resources: Any, number: int, index: Any, options: Any) -> Any:
        self.options.append(options)
        return FakeGpuIndex(self, number, faiss.clone_index(index))

    def index_cpu_to_gpu_multiple_py(
        self, resources: list[Any], index: Any, options: Any, numbers: list[int]
    ) -> Any:
        assert options.shard
        assert len(resources) == len(set(map(id, resources))) == len(numbers)
        self.options.append(options)
        return FakeGpuIndex(self, numbers[0], faiss.clone_index(index), others=tuple(numbers[1:]))

    def _cagra(self, resources: Any, dimension: int, metric: int, config: Any) -> Any:
        flat = faiss.IndexFlat(dimension, metric)
        return FakeGpuIndex(self, config.device, flat, is_cagra=True)


class FakeGpuIndex:
    """Takes what the real ones take and no more: no selector, 2048 candidates at most."""

    def __init__(
        self, gpus: FakeGpus, number: int, index: Any, others: tuple[int, ...] = (), is_cagra: bool = False
    ) -> None:
        self._gpus, self._number, self._index = gpus, number, index
        self._others = others
        self._is_cagra = is_cagra
        self._held: dict[int, int] = {}
        self._hold(index.ntotal)

    def train(self, vectors: np.ndarray) -> None:
        assert self._is_cagra
        self._index.add(vectors)
        self._hold(len(vectors))

    def search(self, vectors: np.ndarray, n_docs: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        self._gpus.threads[self._number].add(threading.get_ident())
        self._gpus.searches.append(Search(self._number, len(vectors), n_docs, params))
        if self._gpus.meeting is not None:
            self._gpus.meeting.wait(30)
        if self._gpus.search_error is not None:
            raise self._gpus.search_error
        assert n_docs <= 2048
        if self._is_cagra:
            assert params.itopk_size >= n_docs
            return self._index.search(vectors, n_docs)
        assert params is None or getattr(params, "sel", None) is None
        return self._index.search(vectors, n_docs, params=params)

    def __del__(self) -> None:
        self._gpus.threads[self._number].add(threading.get_ident())
        for number, held in self._held.items():
            self._gpus.on_device[number] -= held

    def _hold(self, ntotal: int) -> None:
        self._gpus.threads[self._number].add(threading.get_ident())
        numbers = (self._number, *self._others)
        share = ntotal // len(numbers)
        if any(self._gpus.on_device[number] + share > self._gpus.vectors_that_fit for number in numbers):
            raise RuntimeError(
                "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const AllocRequest&)"
                " at /x/StandardGpuResources.cpp:596: Error: 'err == cudaSuccess' failed: out of memory"
            )
        for number in numbers:
            self._gpus.on_device[number] += share
            self._held[number] = share
