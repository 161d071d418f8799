"""The lock of an index folder's one writer, shared by all that this process opens there."""

import fcntl
import threading
from pathlib import Path
from typing import TextIO

from retriever_service.errors import ReadOnlyError

_LOCK_FILE = ".writer.lock"
_held: dict[Path, tuple[TextIO, int]] = {}
_guard = threading.Lock()


def acquire(root: Path) -> None:
    """Takes the folder's lock, or counts one more holder in this process.

    Raises ReadOnlyError where another process has it, or the folder cannot be written to.
    """
    root = root.resolve()
    with _guard:
        stream, holders = _held.get(root, (None, 0))
        if stream is None:
            stream = _lock(root)
        _held[root] = (stream, holders + 1)


def release(root: Path) -> None:
    """Gives the folder's lock back once its last holder in this process has."""
    root = root.resolve()
    with _guard:
        stream, holders = _held.pop(root)
        if holders > 1:
            _held[root] = (stream, holders - 1)
        else:
            stream.close()


def _lock(root: Path) -> TextIO:
    try:
        stream = (root / _LOCK_FILE).open("w", encoding="ascii")
    except OSError as error:
        raise ReadOnlyError(f"{root} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ReadOnlyError(f"another retriever writes to {root}: send changes to it") from error
    return stream
