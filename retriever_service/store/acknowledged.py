"""The number of the last change that was acknowledged, kept beside a changes file to miss those that are gone.

SQLite ends its write-ahead log at the first damaged frame and says nothing. The number is written once a change is
durable, and not synced: it costs an acknowledgement no wait. It outlives the process; after a loss of power it may be
an older one, which misses less and never too much.
"""

import contextlib
import os
import re
import zlib
from pathlib import Path

from retriever_service.errors import DamagedIndexError

_CONTENT = re.compile(rb"([0-9]{20}) ([0-9a-f]{8})\n")
_SIZE_BYTES = 30


class LostChangesError(DamagedIndexError):
    """Changes that were acknowledged are not in the log any more."""

    def __init__(self, changes_file: Path, last: int, acknowledged: int) -> None:
        super().__init__(
            changes_file,
            f"changes {last + 1} to {acknowledged} were acknowledged and are gone, as after damage to"
            f" {changes_file.name}-wal: restore a backup, or go on without them by rag-index repair",
        )
        self.last = last


def acknowledged_file(changes_file: Path) -> Path:
    """Where the number lies."""
    return changes_file.with_name(f"{changes_file.name}-acknowledged")


def read_acknowledged(changes_file: Path) -> int:
    """Returns the number; 0 where none was written. Raises DamagedIndexError naming the file."""
    file = acknowledged_file(changes_file)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise DamagedIndexError(file, f"cannot be read: {error.strerror}") from error
    if len(content) < _SIZE_BYTES:
        return 0  # the disk was full when it was begun
    found = _CONTENT.fullmatch(content)
    if found is None or int(found[2], 16) != zlib.crc32(found[1]):
        raise DamagedIndexError(
            file, "is not what was written: remove it, and what it would have told is not missed"
        )
    return int(found[1])


class Acknowledged:
    """Writes the number; where the disk does not take it, an older one stays."""

    def __init__(self, changes_file: Path) -> None:
        self._stream: int | None = None
        with contextlib.suppress(OSError):
            self._stream = os.open(acknowledged_file(changes_file), os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, sequence: int) -> None:
        """Notes that all changes up to this one are acknowledged."""
        if self._stream is not None:
            number = b"%020d" % sequence
            with contextlib.suppress(OSError):
                os.pwrite(self._stream, b"%b %08x\n" % (number, zlib.crc32(number)), 0)

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None
