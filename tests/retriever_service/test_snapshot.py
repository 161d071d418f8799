"""Index folders: generations, checksums, atomic switching."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from retriever_service.errors import BuildError, DamagedIndexError, MissingIndexError
from retriever_service.index import snapshot
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.verify import verify_index
from tests.retriever_service.tiny_models import make_documents, write_jsonl

Build = Callable[..., Snapshot]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_index_describes_itself(folder: Path) -> None:
    manifest = Snapshot.open(folder).manifest
    assert (manifest.ntotal, manifest.dimension, manifest.kind, manifest.generation) == (60, 16, "Flat", 1)
    assert manifest.embedding.name == "tiny-encoder"
    assert set(manifest.files) == {"documents.sqlite", "index.faiss"}
    assert names(folder) == [".lock", "CURRENT", "generation-000001"]


def test_each_build_is_a_new_generation_and_old_ones_go(
    folder: Path, corpus: Path, build_corpus: Build
) -> None:
    for generation in (2, 3, 4):
        build_corpus(corpus, folder, keep_generations=2)
        assert Snapshot.open(folder).manifest.generation == generation
    assert names(folder) == [".lock", "CURRENT", "generation-000003", "generation-000004"]


def test_generation_that_current_names_is_kept_however_old(
    folder: Path, corpus: Path, build_corpus: Build
) -> None:
    """A folder set back by hand to an old generation: pruning by age alone would take what serves."""
    for _ in range(3):
        build_corpus(corpus, folder, keep_generations=9)
    snapshot.make_current(Snapshot.open(folder / "generation-000001"), folder, keep=1)
    assert names(folder) == [".lock", "CURRENT", "generation-000001", "generation-000004"]
    Snapshot.open(folder).verify()
    (folder / "CURRENT").write_text("not a generation")
    snapshot.prune(folder, keep=1)
    (folder / "CURRENT").unlink()
    snapshot.prune(folder, keep=1)
    assert names(folder) == [".lock", "generation-000001", "generation-000004"]


def test_pruning_takes_what_another_has_removed_for_removed(
    folder: Path, corpus: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retriever that let a generation go pruned beside a compaction, which failed behind its last step."""
    open_folder = snapshot._open_folder
    rmtree = shutil.rmtree

    def open_too_late(path: Path) -> int:
        rmtree(path)
        return open_folder(path)

    def remove_too_late(path: Path, **options: Any) -> None:
        rmtree(path)
        rmtree(path, **options)

    for generation in (2, 3):
        build_corpus(corpus, folder, keep_generations=9)
        (folder / f"live-00000{generation}.sqlite").touch()
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_open_folder", open_too_late)
        snapshot.prune(folder, keep=2)
    assert "generation-000001" not in names(folder)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", remove_too_late)
        snapshot.prune(folder, keep=1)
    assert names(folder) == [".lock", "CURRENT", "generation-000003", "live-000003.sqlite"]


def test_what_cannot_be_pruned_fails_no_publishing(
    folder: Path,
    corpus: Path,
    build_corpus: Build,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patched, caplog.at_level("WARNING"):
        patched.setattr(snapshot, "_remove_unless_held", refuse)
        assert build_corpus(corpus, folder, keep_generations=1).manifest.generation == 2
    assert "old generations stay" in caplog.text
    snapshot.prune(folder, keep=1)
    assert names(folder) == [".lock", "CURRENT", "generation-000002"]


def test_folder_that_cannot_be_looked_into_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(MissingIndexError, match="File name too long"):
        Snapshot.open(tmp_path / ("x" * 300))


def test_one_generation_can_be_opened_by_its_own_folder(
    folder: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, folder)
    assert Snapshot.open(folder / "generation-000001").manifest.generation == 1


@pytest.mark.parametrize("empty", [True, False])
def test_folder_without_an_index_is_said_to_have_none(tmp_path: Path, empty: bool) -> None:
    folder = tmp_path if empty else tmp_path / "nowhere"
    with pytest.raises(MissingIndexError, match="rag-index build"):
        Snapshot.open(folder)


@pytest.mark.parametrize("name", ["CURRENT", "manifest.json", "index.faiss", "documents.sqlite"])
def test_any_damaged_byte_is_refused_with_the_files_name(folder: Path, name: str) -> None:
    file = folder / name if name == "CURRENT" else folder / "generation-000001" / name
    whole = file.read_bytes()
    places = range(len(whole)) if len(whole) < 2000 else range(0, len(whole), len(whole) // 50)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        file.write_bytes(damaged)
        with pytest.raises(DamagedIndexError) as caught:
            Snapshot.open(folder).verify()
        assert name in caught.value.message, place
    file.write_bytes(whole)
    Snapshot.open(folder).verify()


@pytest.mark.parametrize("name", ["index.faiss", "documents.sqlite"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_missing_or_resized_file_is_refused_at_opening(folder: Path, name: str, damage: str) -> None:
    file = folder / "generation-000001" / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] if damage == "shorter" else content + b"x")
    with pytest.raises(DamagedIndexError, match=name):
        Snapshot.open(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedIndexError, match=r"manifest\.json"):
        Manifest.read(tmp_path / "manifest.json")


def test_verify_names_the_file_that_is_damaged(folder: Path) -> None:
    steps: list[str] = []
    verify_index(folder, steps.append)
    assert steps[-1] == "search"
    file = folder / "generation-000001" / "documents.sqlite"
    content = bytearray(file.read_bytes())
    content[5000] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=r"documents\.sqlite: sha256 is"):
        verify_index(folder, steps.append)


def test_nothing_is_named_before_it_is_on_the_disk(
    tmp_path: Path, corpus: Path, build_corpus: Callable[..., Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power cannot be played here; the order that guards against it can."""
    events: list[str] = []
    rename, replace, fsync = Path.rename, Path.replace, snapshot._fsync

    def named(self: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name}")
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Path:
        events.append(f"replace {Path(target).name}")
        return replace(self, target)

    def synced(path: Path) -> None:
        fsync(path)
        events.append(f"sync {path.name}")

    monkeypatch.setattr(Path, "rename", named)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(snapshot, "_fsync", synced)
    build_corpus(corpus, tmp_path / "index")
    generation, current = events.index("rename generation-000001"), events.index("replace CURRENT")
    for file in ("index.faiss", "documents.sqlite", "manifest.json", ".building"):
        assert events.index(f"sync {file}") < generation
    assert "sync index" in events[generation:current]
    assert "sync CURRENT.new" in events[generation:current]
    assert events[current + 1] == "sync index"


def test_every_folder_that_a_build_makes_has_its_name_on_the_disk(
    tmp_path: Path, corpus: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders above a new one were made and not synced: a loss of power could take the index with them."""
    synced: list[Path] = []
    fsync = snapshot._fsync

    def noting(path: Path) -> None:
        fsync(path)
        synced.append(path)

    monkeypatch.setattr(snapshot, "_fsync", noting)
    build_corpus(corpus, tmp_path / "new" / "deep" / "index")
    assert synced[:3] == [tmp_path, tmp_path / "new", tmp_path / "new" / "deep"]


def test_failed_build_leaves_what_serves_alone(folder: Path, tmp_path: Path, build_corpus: Build) -> None:
    before = names(folder)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*make_documents(600, 16), {"text": 5}])
    with pytest.raises(BuildError, match="line 601"):
        build_corpus(bad, folder)
    assert set(names(folder)) - {".building"} == set(before)
    verify_index(folder, lambda what: None)
    corrected = build_corpus(write_jsonl(bad, make_documents(601, 16, seed=3)), folder)
    whole = build_corpus(bad, tmp_path / "whole")
    assert corrected.manifest.files == whole.manifest.files


def test_two_builds_at_once_are_refused(folder: Path, corpus: Path, build_corpus: Build) -> None:
    with (
        snapshot.building(folder, "a recipe"),
        pytest.raises(BuildError, match="another build or compaction"),
    ):
        build_corpus(corpus, folder)
    build_corpus(corpus, folder)


_BUILD_PROGRAM = """
import os, sys, time
from retriever_service.index import snapshot
from retriever_service.ingest import vectors
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader

corpus, folder, kind, stop_at = sys.argv[1:]
vectors._VECTORS_PER_CHUNK = 100

def stop(name):
    if name == stop_at:
        print("here", flush=True)
        time.sleep(0 if name == "start" else 60)

fsync = snapshot._fsync
def slow_fsync(path):
    fsync(path)
    stop(f"fsync {path.name}")
snapshot._fsync = slow_fsync

stop("start")
from pathlib import Path
build_index(CorpusReader(Path(corpus)), Path(folder), encoder=None, embedding_name="tiny-encoder",
            options=BuildOptions(kind=kind, checkpoint_s=0),
            progress=lambda stage, done, total: stop(f"{stage} {done}"))
"""

KILLED_AT = [
    ("documents 0", 1),
    ("documents 512", 1),
    ("index 300", 1),
    ("index 700", 1),
    ("publish 0", 1),
    ("fsync manifest.json", 1),
    ("fsync CURRENT.new", 1),
    ("publish 1", 2),
]


def start_build(corpus: Path, folder: Path, kind: str, stop_at: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _BUILD_PROGRAM, str(corpus), str(folder), kind, stop_at]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("stop_at", "generation"), KILLED_AT)
def test_build_killed_midway_leaves_an_index_that_serves(
    folder: Path, tmp_path: Path, build_corpus: Build, stop_at: str, generation: int
) -> None:
    corpus = write_jsonl(tmp_path / "more.jsonl", make_documents(700, 16, seed=9))
    build = start_build(corpus, folder, "HNSW8", stop_at)
    assert build.stdout is not None
    assert build.stdout.readline() == "here\n"
    os.kill(build.pid, signal.SIGKILL)
    assert build.wait(10) == -signal.SIGKILL
    build.stdout.close()
    left = verify_index(folder, lambda what: None).manifest
    assert (left.generation, left.ntotal) == (generation, 60 if generation == 1 else 700)
    rebuilt: Any = build_corpus(corpus, folder, kind="HNSW8").manifest
    assert rebuilt.ntotal == 700
    assert rebuilt.generation > generation
    assert not [name for name in names(folder) if name.startswith(".building")]
    verify_index(folder, lambda what: None)


@pytest.mark.parametrize("kind", ["HNSW8", "IVF8,PQ4x4"])
def test_build_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """Each run gets a little further than the last before SIGKILL; a build that begins anew never ends."""
    corpus = write_jsonl(tmp_path / "more.jsonl", make_documents(1300, 16, seed=9))
    for stop_at in ("documents 512", "documents 1024", "index 0", "index 300", "index 1100", "publish 0"):
        with start_build(corpus, tmp_path / "killed", kind, stop_at) as build:
            assert build.stdout is not None
            assert build.stdout.readline() == "here\n"
            build.kill()
    for folder in ("killed", "whole"):
        with start_build(corpus, tmp_path / folder, kind, "never") as build:
            pass
        assert build.returncode == 0
    killed, whole = (Snapshot.open(tmp_path / folder).manifest for folder in ("killed", "whole"))
    assert killed.files == whole.files
    assert killed.model_copy(update={"created_at": whole.created_at}) == whole


@pytest.mark.timeout(900)
def test_builds_killed_at_any_moment_leave_an_index_that_serves(folder: Path, tmp_path: Path) -> None:
    """KILLED_BUILDS=100 in the environment kills more of them, at other moments each time."""
    corpus = write_jsonl(tmp_path / "more.jsonl", make_documents(700, 16, seed=9))
    random = Random()
    for _ in range(int(os.environ.get("KILLED_BUILDS", "8"))):
        with start_build(corpus, folder, "HNSW8", "start") as build:
            assert build.stdout is not None
            assert build.stdout.readline() == "here\n"
            time.sleep(random.uniform(0, 0.25))
            build.kill()
        assert verify_index(folder, lambda what: None).manifest.ntotal in {60, 700}
    with start_build(corpus, folder, "HNSW8", "never"), start_build(corpus, tmp_path / "x", "HNSW8", "never"):
        pass
    killed, whole = (Snapshot.open(path).manifest for path in (folder, tmp_path / "x"))
    assert killed.files == whole.files


def test_finished_generation_is_taken_up_where_only_current_was_missing(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "more.jsonl", make_documents(700, 16, seed=9))
    with start_build(corpus, tmp_path / "index", "Flat", "fsync CURRENT.new") as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "here\n"
        build.kill()
    with start_build(corpus, tmp_path / "index", "Flat", "never"):
        pass
    assert names(tmp_path / "index") == [".lock", "CURRENT", "generation-000001"]
    assert Snapshot.open(tmp_path / "index").manifest.ntotal == 700


def test_other_kind_keeps_the_documents_that_a_killed_build_wrote(
    tmp_path: Path, build_corpus: Build
) -> None:
    corpus = write_jsonl(tmp_path / "more.jsonl", make_documents(700, 16, seed=9))
    with start_build(corpus, tmp_path / "index", "HNSW8", "index 300") as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "here\n"
        build.kill()
    (left,) = (tmp_path / "index" / ".building").glob("documents.sqlite")
    written = left.stat().st_ino
    snapshot = build_corpus(corpus, tmp_path / "index", kind="IVF8,Flat")
    assert snapshot.documents_file.stat().st_ino == written
    assert snapshot.manifest.kind == "IVF8,Flat"
    verify_index(tmp_path / "index", lambda what: None)
