"""ACTIVE: which index folder serves in place of a retriever's own, written down so that a restart finds it."""

import json
import os
from pathlib import Path

from retriever_service.errors import DamagedIndexError
from retriever_service.index.snapshot import write_durably

ACTIVE_FILE = "ACTIVE"


def read_active(home: Path) -> tuple[Path, int]:
    """Returns the folder that serves for `home`, and what is added to the numbers of its generations.

    Raises DamagedIndexError where the file says something else.
    """
    file = home / ACTIVE_FILE
    try:
        content = json.loads(file.read_bytes())
        folder, offset = content["index_folder"], content["number_offset"]
        if not isinstance(folder, str) or not isinstance(offset, int):
            raise DamagedIndexError(file, "does not name an index folder")
    except FileNotFoundError:
        return home, 0
    except NotADirectoryError:
        return home, 0
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(file, f"does not name an index folder: {error}") from error
    return Path(os.path.normpath(home / folder)), offset


def active_version(home: Path) -> tuple[int, int] | None:
    """Returns something that is different after each `write_active`; None before the first."""
    try:
        found = (home / ACTIVE_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def write_active(home: Path, folder: Path, number_offset: int) -> None:
    """Writes it, durably and at once; the folder as seen from `home`, so that both can move together."""
    content = {
        "index_folder": os.path.relpath(folder.resolve(), home.resolve()),
        "number_offset": number_offset,
    }
    write_durably(home / ACTIVE_FILE, json.dumps(content) + "\n")
