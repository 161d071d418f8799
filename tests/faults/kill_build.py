"""Kills `rag-index build` again and again, lets it end, and holds the result against an undisturbed one."""

import collections
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from retriever_service.corpus.local import LocalCorpus
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import cli, vectors
from retriever_service.ingest.verify import verify_index
from tests.faults import processes
from tests.faults.changing_corpus import EMBEDDING, Change, apply, vector_of
from tests.faults.kill_corpus import build_tiny

_KINDS_OF_INDEX = ("Flat", "HNSW8", "IVF8,PQ4x4")
_OLD, _NEW = 60, 2600
_VECTORS_PER_CHUNK = 200
_MOST_KILLS_A_BUILD = 6


def build_until_killed(corpus: Path, folder: Path, kind: str, events: Connection) -> None:
    """What the process runs: the command `rag-index build`, with chunks small enough to be killed between."""
    vectors._VECTORS_PER_CHUNK = _VECTORS_PER_CHUNK
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sys.argv = ["rag-index", "build", "--input", str(corpus), "--output", str(folder), "--kind", kind]
    sys.argv += ["--embedding-model-name", EMBEDDING.name, "--checkpoint-s", "0"]
    events.send("begun")
    cli.main()


class KilledBuild:
    """A folder whose old generation serves, with changes, while new ones are built into it."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._folder = root / "built"
        self._random = random.Random(seed)
        self._processes = processes.context()
        self._took_s = 0.5
        self._corpus = root / "new.jsonl"
        _write_corpus(self._corpus)
        build_tiny(
            self._folder, [{"key": f"old-{row}", "title": "", "text": f"{row}"} for row in range(_OLD)]
        )
        self._whole: dict[str, Snapshot] = {}
        self.builds = 0

    def kill_build(self, kind: str, most_kills: int) -> list[str]:
        """Builds the next generation, killed on the way and resumed; returns the stages under way when killed.

        Raises AssertionError.
        """
        if kind not in self._whole:
            self._run(kind, self._root / f"whole {kind}", kill_after_s=None)
            self._whole[kind] = verify_index(self._root / f"whole {kind}", _quietly)
        serving = self._change_what_serves()
        killed: list[str] = []
        goal = self._random.randint(1, min(most_kills, _MOST_KILLS_A_BUILD))
        while len(killed) < goal and self._serves() == serving.manifest:
            if not self._run(kind, self._folder, self._random.uniform(0, 1.1) * self._took_s):
                break
            killed.append(self._stage(serving))
            self._check_serving(serving)
        if self._serves() == serving.manifest:
            with self._goes_on_with_its_documents():
                self._run(kind, self._folder, kill_after_s=None)
        self._check_result(kind, serving)
        self.builds += 1
        return killed

    def _run(self, kind: str, folder: Path, kill_after_s: float | None) -> bool:
        """Runs the command to its end, or to its kill; returns whether it was killed."""
        ours, theirs = self._processes.Pipe(duplex=False)
        process = self._processes.Process(
            target=build_until_killed, args=(self._corpus, folder, kind, theirs), daemon=True
        )
        process.start()
        theirs.close()
        try:
            assert ours.recv() == "begun"
            began_s = time.monotonic()
            process.join(kill_after_s)
            is_killed = process.is_alive()
            took_s = time.monotonic() - began_s
        finally:
            process.kill()
            process.join()
            ours.close()
        # One that ends while it is being killed is as good as killed too late.
        assert process.exitcode in ({0, -signal.SIGKILL} if is_killed else {0}), f"exit {process.exitcode}"
        if folder != self._folder:
            self._took_s = took_s
        return is_killed

    def _change_what_serves(self) -> Snapshot:
        """Changes the documents that serve; the build must leave that alone."""
        corpus = LocalCorpus(self._folder)
        try:
            fresh = {"fresh": f"fresh {self.builds}"}
            apply(corpus, Change("upsert", self._folder.name, f"build {self.builds}", fresh))
        finally:
            corpus.close()
        return Snapshot.open(self._folder)

    def _serves(self) -> object:
        return Snapshot.open(self._folder).manifest

    def _check_serving(self, serving: Snapshot) -> None:
        """What CURRENT names is whole: the old generation with its changes, or the new one."""
        found = verify_index(self._folder, _quietly)
        if found.manifest != serving.manifest:
            return
        corpus = LocalCorpus(self._folder)
        try:
            documents = corpus.generation.store.documents_by_key(["fresh"])
            assert documents["fresh"].text == f"fresh {self.builds}", "a build has lost a change"
        finally:
            corpus.close()

    def _check_result(self, kind: str, serving: Snapshot) -> None:
        built, whole = verify_index(self._folder, _quietly).manifest, self._whole[kind].manifest
        assert built.generation > serving.manifest.generation
        assert built.ntotal == _NEW
        assert built.files == whole.files, "documents or vectors differ from those of an undisturbed build"
        left = [path.name for path in self._folder.iterdir() if path.name.startswith(".building")]
        assert not left, f"a finished build leaves {left}"

    def _stage(self, serving: Snapshot) -> str:
        """Tells from the folder what a killed build was at."""
        work = self._folder / ".building"
        if (work / "index.faiss").exists():
            return "publish"
        if (work / "documents.sqlite").exists():
            return "index"
        if work.exists():
            return "documents"
        newest = max(self._folder.glob("generation-*")).name
        return "publish" if newest != serving.folder.name else "before it began"

    @contextlib.contextmanager
    def _goes_on_with_its_documents(self) -> Iterator[None]:
        """Raises AssertionError where the build that follows writes documents anew that are there already."""
        work = self._folder / ".building"
        written = [work / name for name in ("documents.sqlite", "documents.sqlite.unfinished")]
        with contextlib.ExitStack() as held:
            # Held open: the number of a removed file would be given again.
            inodes = [
                os.fstat(held.enter_context(file.open("rb")).fileno()).st_ino
                for file in written
                if file.exists()
            ]
            yield
        built = Snapshot.open(self._folder).documents_file.stat().st_ino
        assert not inodes or built in inodes, "a build wrote again what a killed one had written"


def _write_corpus(file: Path) -> None:
    texts = [f"new {row}" for row in range(_NEW)]
    lines = [
        json.dumps({"key": f"new-{row}", "title": "", "text": text, "embedding": vector_of(text).tolist()})
        for row, text in enumerate(texts)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quietly(step: str) -> None:
    pass


def run(root: Path, kills: int, seed: int, *, say: bool = False) -> collections.Counter[str]:
    """Kills so many builds; returns how often each stage was under way. Raises AssertionError."""
    build = KilledBuild(root, seed)
    counts: collections.Counter[str] = collections.Counter()
    while (left := kills - counts.total()) > 0:
        counts.update(build.kill_build(_KINDS_OF_INDEX[build.builds % len(_KINDS_OF_INDEX)], left))
        if say and build.builds % 5 == 0:
            print(f"{counts.total()} kills, {build.builds} builds, {dict(counts)}", flush=True)
    counts["builds"] = build.builds
    return counts
