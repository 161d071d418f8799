"""A GPU that indexes lie on: its faiss resources, and the one thread that uses them."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import faiss

AnswerT = TypeVar("AnswerT")

# The names that SWIG generates have no types, and those of the GPU are not in every build.
_faiss: Any = faiss


class GpuError(Exception):
    """Something that faiss cannot do on a GPU, and why; the CPU does it, so no caller ever sees this."""


class GpuDevice:
    """Everything that is made, searched or freed on this GPU is so in one thread: faiss shares nothing there."""

    def __init__(self, number: int, *, temp_memory_bytes: int | None = None) -> None:
        """`temp_memory_bytes` is the scratch memory set aside for searches; None takes faiss's own amount."""
        self.number = number
        self.name = f"cuda:{number}"
        self._temp_memory_bytes = temp_memory_bytes
        self._owner = ThreadPoolExecutor(1, f"gpu-{number}")
        self._resources: Any = None

    def run(self, work: Callable[[Any], AnswerT]) -> AnswerT:
        """Calls `work` with the GPU's resources in its thread, and waits. Raises what `work` raises."""
        return self._owner.submit(lambda: work(self._made_resources())).result()

    def close(self) -> None:
        """Ends the thread; what lies on the GPU must be freed before."""
        self._owner.submit(self._drop_resources).result()
        self._owner.shutdown()

    def _made_resources(self) -> Any:
        if self._resources is None:
            resources = _faiss.StandardGpuResources()
            if self._temp_memory_bytes is not None:
                resources.setTempMemory(self._temp_memory_bytes)
            self._resources = resources
        return self._resources

    def _drop_resources(self) -> None:
        self._resources = None


def device_numbers(devices: str) -> list[int]:
    """Returns the GPUs that a setting names: "all", or numbers such as "0,1" or "cuda:0,cuda:1".

    Raises GpuError where faiss has no GPU code, or there is no such GPU.
    """
    if not hasattr(_faiss, "StandardGpuResources"):
        raise GpuError("this faiss has no GPU code: install ragpair[gpu] in place of ragpair[cpu]")
    try:
        num_gpus = int(_faiss.get_num_gpus())
    except RuntimeError as error:
        raise GpuError(f"faiss finds no GPU: {error}") from error
    if num_gpus == 0:
        raise GpuError("faiss finds no GPU")
    if devices == "all":
        return list(range(num_gpus))
    numbers = list(dict.fromkeys(int(digits) for digits in re.findall(r"\d+", devices)))
    missing = [number for number in numbers if number >= num_gpus]
    if missing:
        raise GpuError(f"there is no cuda:{missing[0]}: faiss finds {num_gpus} GPUs")
    return numbers
