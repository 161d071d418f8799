"""What was used last, as much of it as fits a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class BoundedCache(Generic[KeyT, ValueT]):
    """Forgets what was not used for the longest time. Its methods may be called from many threads."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get_all(self, keys: Iterable[KeyT]) -> list[ValueT | None]:
        """Returns the value of each key, None where it is not here."""
        with self._lock:
            return [self._use(key) for key in keys]

    def put_all(self, added: Sequence[tuple[KeyT, ValueT, int]]) -> None:
        """Takes (key, value, bytes that they hold); values of keys that are here already are left."""
        with self._lock:
            for key, value, size_bytes in added:
                if key in self._entries or size_bytes > self._max_bytes:
                    continue
                self._entries[key] = value, size_bytes
                self.size_bytes += size_bytes
            while self.size_bytes > self._max_bytes:
                _, (_, forgotten_bytes) = self._entries.popitem(last=False)
                self.size_bytes -= forgotten_bytes

    def _use(self, key: KeyT) -> ValueT | None:
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]
