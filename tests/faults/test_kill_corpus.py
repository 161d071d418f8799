"""What was acknowledged outlives a killed process; a full disk refuses changes and leaves the rest."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import DiskFullError
from retriever_service.ingest.verify import verify_index
from retriever_service.types import SearchParameters
from tests.faults import kill_corpus
from tests.faults.changing_corpus import Change, apply, vector_of


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    counts = kill_corpus.run(tmp_path, kills=8, seed=1)
    assert counts["acknowledged"] > 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_refuses_changes_until_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        documents = [{"key": f"doc-{row}", "title": "", "text": f"built {row}"} for row in range(20)]
        kill_corpus.build_tiny(disk / "index", documents)
        corpus = LocalCorpus(disk / "index")
        try:
            filler = disk / "filler"
            written = _write_until_full(corpus, filler)
            found, _ = corpus.generation.index.search(vector_of("built 3")[None], 1, SearchParameters())
            assert found[0, 0] == 3
            assert len(corpus.generation.store) == 20 + written
            filler.unlink()
            apply(corpus, Change("upsert", "index", "after", {"after": "there is room"}))
        finally:
            corpus.close()
        corpus = LocalCorpus(disk / "index")
        try:
            assert corpus.page("after", 1).documents[0].key.startswith("big")
            assert len(corpus.generation.store) == 21 + written
            rows = corpus.generation.store.rows()
            assert np.isfinite(corpus.generation.store.embeddings_of(rows.tolist())).all()
        finally:
            corpus.close()
        verify_index(disk / "index", lambda step: None)


def _write_until_full(corpus: LocalCorpus, filler: Path) -> int:
    """Fills the disk, but for a little, and writes documents until one is refused; returns how many were not."""
    free = os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize
    filler.write_bytes(bytes(max(0, free - 600_000)))
    for number in range(100):
        big = Change("upsert", "index", f"big {number}", {f"big-{number:02d}": "x" * 50_000})
        try:
            apply(corpus, big)
        except DiskFullError:
            return number
    raise AssertionError("the disk never filled")
