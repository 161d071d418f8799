"""The GPUs of a retriever: what puts indexes on them, and again once there is room."""

import logging
import threading
from collections.abc import Callable, Sequence

from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.fallback import IndexFallback, SearchFallback
from retriever_service.index.gpu.copy import GpuCopy, GpuOptions, check_movable
from retriever_service.index.gpu.device import GpuDevice, GpuError, device_numbers
from retriever_service.index.gpu.index import GpuIndex

logger = logging.getLogger(__name__)
_STAYS = "the index stays on the CPU: kind %s: %s"


class GpuPool:
    """Shared by the generations of a retriever, of which a few serve at once."""

    def __init__(
        self, devices: Sequence[GpuDevice], options: GpuOptions, fell_back: Callable[[SearchFallback], None]
    ) -> None:
        self._devices = devices
        self._options = options
        self._fell_back = fell_back
        # A copy of an index for each, or one in shards on all of them.
        self._groups = [devices] if options.sharding else [[device] for device in devices]
        self._moving = threading.Lock()
        self._waiting: list[GpuIndex] = []

    @classmethod
    def open(
        cls,
        devices: str,
        options: GpuOptions,
        *,
        temp_memory_bytes: int | None,
        fell_back: Callable[[SearchFallback], None],
    ) -> "GpuPool | None":
        """Takes the GPUs that a setting names: see `device_numbers`. None, and a log line, where it cannot.

        `fell_back` hears, in any thread, of each search that the CPU answers in a GPU's place.
        """
        try:
            numbers = device_numbers(devices)
        except GpuError as error:
            logger.warning("indexes stay on the CPU: --index-devices %s: %s", devices, error)
            return None
        gpus = [GpuDevice(number, temp_memory_bytes=temp_memory_bytes) for number in numbers]
        return cls(gpus, options, fell_back)

    def place(self, index: FaissIndex) -> FaissIndex | GpuIndex:
        """Puts an index on the GPUs; the log says where it is, or why it stays on the CPU.

        One that finds no memory is tried again whenever another leaves.
        """
        try:
            check_movable(index.faiss_index, self._options)
        except GpuError as error:
            logger.warning(_STAYS, index.kind(), error)
            index.fallback = IndexFallback.KIND
            return index
        placed = GpuIndex(
            index,
            self._options,
            parallel_searches=len(self._groups),
            left=self._left,
            fell_back=self._fell_back,
        )
        self._move(placed)
        return placed

    def _move(self, index: GpuIndex) -> None:
        """Makes the index's copies, on as many GPUs as have room for one."""
        with self._moving:
            copies, refused = [], []
            for devices in self._groups:
                try:
                    copies.append(GpuCopy(devices, index.cpu.faiss_index, self._options))
                except GpuError as error:
                    refused.append(f"{','.join(device.name for device in devices)}: {error}")
            index.put(copies)
            if refused and not copies:
                logger.warning(_STAYS, index.cpu.kind(), "; ".join(refused))
                self._waiting.append(index)
            elif refused:
                logger.warning(
                    "the index is not on every GPU: kind %s: %s", index.cpu.kind(), "; ".join(refused)
                )
            else:
                logger.info("the index is on %s: kind %s", ",".join(index.devices), index.cpu.kind())

    def _left(self, index: GpuIndex) -> None:
        """Hears that an index has freed its memory, and gives those that wait for some another chance."""
        with self._moving:
            waiting = [one for one in self._waiting if one is not index and not one.is_closed]
            self._waiting = []
        for one in waiting:
            self._move(one)

    def close(self) -> None:
        """Ends the GPUs' threads; the indexes on them must be closed before."""
        for device in self._devices:
            device.close()
