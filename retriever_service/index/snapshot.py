"""The index folder: generations with their manifests and checksums, written and switched atomically.

    folder/
      CURRENT                    the generation that serves, and its manifest's digest
      .lock                      held by the one build or compaction that may publish here
      .writer.lock               held by the one retriever that may change documents here
      ACTIVE                     the index folder that serves in place of this one, once ActivateIndex was called
      generation-000001/         a build
        manifest.json            what the generation is, and the sha256 of each of its files
        index.faiss              the vector index
        documents.sqlite         documents and exact embeddings
      live-000001.sqlite         every change of the documents since that build: see store.live
      live-000001.sqlite-acknowledged   the last one's number: see store.acknowledged
      generation-000002/         a compaction of build 1 and its changes
        manifest.json            also: the build, and the number of the last change that is in the index
        index.faiss              the vector index
        rows.npy                 int64: the row of each of its vectors, ascending

A generation never changes once its folder has its name. A build writes into a hidden folder beside, makes it
durable (fsync), renames it, and only then replaces CURRENT: whenever it is killed, the old generation serves.
What it had written stays, and the next build of the same recipe goes on from there. A server holds a shared
lock on the generations it has open, and nobody removes a generation that is locked.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from retriever_service.errors import BuildError, DamagedIndexError, MissingIndexError
from retriever_service.index.manifest import MANIFEST_FILE, FileEntry, Manifest, sha256_of_file

logger = logging.getLogger(__name__)

INDEX_FILE = "index.faiss"
DOCUMENTS_FILE = "documents.sqlite"
CURRENT_FILE = "CURRENT"
ROWS_FILE = "rows.npy"
_LOCK_FILE = ".lock"
_BUILDING_FOLDER = ".building"
_COMPACTING_FOLDER = ".compacting"
_RECIPE_FILE = "recipe.sha256"
_GENERATION = re.compile(r"generation-(\d{6,})")
_LIVE = re.compile(r"live-(\d{6,})\.sqlite(-wal|-shm|-journal|-acknowledged)?")
_CURRENT = re.compile(rf"({_GENERATION.pattern}) (sha256:[0-9a-f]{{64}})\n")


class Snapshot:
    """One generation on disk, immutable."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path, only: Collection[str] | None = None) -> "Snapshot":
        """Opens the current generation of an index folder, or a generation's own folder.

        Checks the manifest and that each file, or each of `only`, is there with its size; contents are left to
        `verify`.
        Raises MissingIndexError where there is no index and DamagedIndexError naming a bad file.
        """
        try:
            is_root = (folder / CURRENT_FILE).is_file()
            stands_alone = not is_root and (folder / MANIFEST_FILE).is_file()
        except OSError as error:
            raise MissingIndexError(f"no index in {folder}: {error.strerror}") from error
        if is_root:
            generation, digest = _read_current(folder)
        elif stands_alone:
            generation, digest = folder, None
        else:
            raise MissingIndexError(
                f"no index in {folder}: build one with `rag-index build --output {folder} …`"
            )
        manifest = Manifest.read(generation / MANIFEST_FILE)
        if digest is not None and manifest.digest() != digest:
            current = folder / CURRENT_FILE
            raise DamagedIndexError(
                current, f"names {digest} where {generation / MANIFEST_FILE} is {manifest.digest()}"
            )
        snapshot = cls(generation, manifest)
        snapshot._check_sizes(only)
        return snapshot

    @property
    def index_file(self) -> Path:
        """The vector index."""
        return self.folder / INDEX_FILE

    @property
    def documents_file(self) -> Path:
        """Documents and exact embeddings."""
        return self.folder / DOCUMENTS_FILE

    @property
    def rows_file(self) -> Path:
        """The row of each vector; a compaction has one."""
        return self.folder / ROWS_FILE

    @property
    def root(self) -> Path | None:
        """The index folder that this generation is part of; None where it stands alone."""
        root = self.folder.parent
        return root if _GENERATION.fullmatch(self.folder.name) and (root / CURRENT_FILE).is_file() else None

    def base(self) -> "Snapshot":
        """The build whose documents these are: itself, unless it is a compaction, which needs nothing else of it.

        Raises DamagedIndexError where that is not there, or not whole.
        """
        if self.manifest.base_generation is None:
            return self
        folder = self.folder.parent / _generation_name(self.manifest.base_generation)
        if not (folder / MANIFEST_FILE).is_file():
            raise DamagedIndexError(folder / MANIFEST_FILE, f"missing: {self.folder.name} goes back to it")
        return Snapshot.open(folder, (DOCUMENTS_FILE,))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the generation from being removed. Raises MissingIndexError where it has just been."""
        descriptor = _open_folder(self.folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not (self.folder / MANIFEST_FILE).exists():
                raise MissingIndexError(f"{self.folder} has just been removed")
            yield
        finally:
            os.close(descriptor)

    def verify(self, only: Collection[str] | None = None) -> None:
        """Reads every file, or those of `only`, through.

        Raises DamagedIndexError naming the first whose sha256 differs.
        """
        for name, entry in self._files(only):
            actual = sha256_of_file(self.folder / name)
            if actual != entry.sha256:
                raise DamagedIndexError(
                    self.folder / name, f"sha256 is {actual}, the manifest says {entry.sha256}"
                )

    def _files(self, only: Collection[str] | None) -> list[tuple[str, FileEntry]]:
        return [(name, entry) for name, entry in self.manifest.files.items() if only is None or name in only]

    def _check_sizes(self, only: Collection[str] | None) -> None:
        for name, entry in self._files(only):
            file = self.folder / name
            if not file.is_file():
                raise DamagedIndexError(file, "missing")
            if file.stat().st_size != entry.size_bytes:
                raise DamagedIndexError(
                    file, f"has {file.stat().st_size} bytes, the manifest says {entry.size_bytes}"
                )


@contextlib.contextmanager
def building(folder: Path, recipe: str) -> Iterator[Path]:
    """Gives a build a hidden folder to write in; the one that a build of the same recipe left, if there is one.

    It stays where the build is killed, interrupted or out of disk, so that the same build can go on; a build of
    another recipe clears it. Holds the index folder's lock. Raises BuildError while another build runs.
    """
    _make_folder(folder)
    with _publishing(folder):
        work = folder / _BUILDING_FOLDER
        if not _made_by(work, recipe):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            (work / _RECIPE_FILE).write_text(recipe, encoding="ascii")
        yield work


@contextlib.contextmanager
def compacting(folder: Path) -> Iterator[Path]:
    """Gives a compaction a hidden folder to write in, and takes it away afterwards if it was not published.

    What one left that was killed, or out of disk, before CURRENT named it goes too. Holds the index folder's lock.
    Raises BuildError while a build runs.
    """
    with _publishing(folder):
        _remove_unnamed(folder)
        work = folder / _COMPACTING_FOLDER
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            yield work
        except OSError:
            _remove_unnamed(folder)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _remove_unnamed(folder: Path) -> None:
    """Removes compactions newer than what CURRENT names; the next one begins anew, where a build would go on."""
    current = _read_current(folder)[0]
    for _, path in _generations(folder):
        if path == current:
            return
        if not (path / _RECIPE_FILE).exists():
            _remove_unless_held(path)


@contextlib.contextmanager
def _publishing(folder: Path) -> Iterator[None]:
    with (folder / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another build or compaction is writing to {folder}") from error
        yield


def unpublished(folder: Path, recipe: str) -> Snapshot | None:
    """Returns the generation that a build of this recipe had finished when it was killed before CURRENT named it.

    Only the newest can be one. Raises DamagedIndexError where CURRENT is damaged.
    """
    newest = next(iter(_generations(folder)), None)
    current = _read_current(folder)[0] if (folder / CURRENT_FILE).is_file() else None
    if newest is None or newest[1] == current or not _made_by(newest[1], recipe):
        return None
    return Snapshot.open(newest[1])


def next_generation(folder: Path) -> int:
    """Returns one more than the newest generation in the folder, damaged or not; 1 in an empty one."""
    return max((number for number, _ in _generations(folder)), default=0) + 1


def publish(work: Path, folder: Path, manifest: Manifest, *, keep: int) -> Snapshot:
    """Makes the files in `work` the folder's current generation, durably, then drops old ones: see `prune`."""
    manifest.write(work / MANIFEST_FILE)
    for file in work.iterdir():
        _fsync(file)
    _fsync(work)
    generation = folder / _generation_name(manifest.generation)
    work.rename(generation)
    _fsync(folder)
    return make_current(Snapshot(generation, manifest), folder, keep=keep)


def make_current(snapshot: Snapshot, folder: Path, *, keep: int) -> Snapshot:
    """Points CURRENT at a generation of the folder, durably, then drops old ones: see `prune`."""
    write_durably(folder / CURRENT_FILE, f"{snapshot.folder.name} {snapshot.manifest.digest()}\n")
    try:
        prune(folder, keep=keep)
    except OSError as error:
        # What is current is so already; the next one removes what this one could not.
        logger.warning("old generations stay: %s", error)
    return snapshot


def prune(folder: Path, *, keep: int) -> None:
    """Removes all but the `keep` newest generations, CURRENT's, those that a server holds, and the builds they
    go back to.

    The changes of a build go with it. Where CURRENT cannot be read, nothing is removed. Others may publish, or
    prune, at the same time. Raises OSError where something cannot be removed.
    """
    try:
        current, _ = _read_current(folder)
    except (OSError, DamagedIndexError):
        return
    generations = _generations(folder)
    kept = [*generations[:keep], *(one for one in generations[keep:] if one[1] == current)]
    needed = {_base_number(number, path) for number, path in kept}
    for number, path in generations[keep:]:
        if path != current and number not in needed and not _remove_unless_held(path):
            needed.add(_base_number(number, path))
    files = list(folder.iterdir())
    # Looked up behind them: a build is there before its changes are.
    left = {number for number, _ in _generations(folder)}
    for file in files:
        live = _LIVE.fullmatch(file.name)
        if live is not None and int(live[1]) not in left:
            file.unlink(missing_ok=True)


def live_file(root: Path, base_generation: int) -> Path:
    """Where the changes since a build lie."""
    return root / f"live-{base_generation:06d}.sqlite"


def file_entries(work: Path, names: Sequence[str] = (DOCUMENTS_FILE, INDEX_FILE)) -> dict[str, FileEntry]:
    """Returns size and sha256 of each file of a generation, by name."""
    return {
        name: FileEntry(size_bytes=(work / name).stat().st_size, sha256=sha256_of_file(work / name))
        for name in names
    }


def write_durably(file: Path, content: str) -> None:
    """Replaces a small file at once: a reader, or a crash, finds the old content or the new."""
    waiting = file.with_name(f"{file.name}.new")
    waiting.write_text(content, encoding="utf-8")
    _fsync(waiting)
    waiting.replace(file)
    _fsync(file.parent)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing; each has its name on the disk, not in memory alone."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        _fsync(one.parent)


def _generation_name(number: int) -> str:
    return f"generation-{number:06d}"


def _base_number(number: int, path: Path) -> int:
    """The build that a generation goes back to; its own number where that cannot be read."""
    try:
        return Manifest.read(path / MANIFEST_FILE).base_generation or number
    except DamagedIndexError:
        return number


def _remove_unless_held(path: Path) -> bool:
    """Returns whether it is gone, which another may have seen to."""
    try:
        descriptor = _open_folder(path)
    except MissingIndexError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(descriptor)
    return True


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise MissingIndexError(f"{path} has just been removed") from error


def _made_by(work: Path, recipe: str) -> bool:
    try:
        return (work / _RECIPE_FILE).read_text(encoding="ascii", errors="replace") == recipe
    except OSError:
        return False


def _read_current(folder: Path) -> tuple[Path, str]:
    file = folder / CURRENT_FILE
    match = _CURRENT.fullmatch(file.read_bytes().decode("ascii", errors="replace"))
    if match is None:
        raise DamagedIndexError(file, "does not name a generation and its digest")
    generation = folder / match[1]
    if not (generation / MANIFEST_FILE).is_file():
        raise DamagedIndexError(file, f"names {match[1]}, which is not there")
    return generation, match[3]


def _generations(folder: Path) -> list[tuple[int, Path]]:
    """Returns the folder's generations, newest first."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if path.is_dir() and (match := _GENERATION.fullmatch(path.name)) is not None
    ]
    return sorted(found, reverse=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
