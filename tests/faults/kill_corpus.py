"""Kills a process that changes a corpus, again and again, and checks what the next start finds."""

import collections
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.corpus.base import Corpus
from retriever_service.corpus.local import LocalCorpus
from retriever_service.index.faiss_index import set_num_threads
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.ingest.verify import verify_index
from retriever_service.types import SearchParameters
from tests.faults import processes
from tests.faults.changing_corpus import (
    EMBEDDING,
    FOLDERS,
    Change,
    Switch,
    apply,
    change_until_killed,
    open_active,
    vector_of,
)

KINDS = ("upsert", "delete", "compact", "activate")
_KINDS_OF_INDEX = {"flat": "Flat", "graph": "HNSW8"}
_BUILT = 100


class KilledCorpus:
    """Index folders, of which one serves, and what must be in them."""

    longest_s = 0.05  # after which a change that has begun is killed at the latest

    def __init__(self, root: Path, seed: int, kinds: Mapping[str, str] = _KINDS_OF_INDEX) -> None:
        """`kinds` are the folders' names and kinds; the first is the one that serves at the beginning."""
        self._root = root
        self._random = random.Random(seed)
        self._processes = processes.context()
        self._took_s = dict.fromkeys(KINDS, 0.002)
        self.texts: dict[str, dict[str, str]] = {}
        self.active = next(iter(kinds))
        self.home = root / self.active
        self.acknowledged = 0
        self._last: tuple[Change, object] | None = None
        for name, index_kind in kinds.items():
            documents = [{"key": f"doc-{row}", "title": "", "text": f"{name} {row}"} for row in range(_BUILT)]
            build_tiny(root / name, documents, index_kind)
            self.texts[name] = {one["key"]: one["text"] for one in documents}

    def kill_often(self, kills: int, *, say: bool) -> collections.Counter[str]:
        """Kills so many processes, in each kind of change in turn; returns how often each was under way."""
        counts: collections.Counter[str] = collections.Counter()
        for number in range(kills):
            counts.update(self.kill_during(KINDS[number % len(KINDS)]) or ["between changes"])
            if say and (number + 1) % 10 == 0:
                print(f"{number + 1} kills, {self.acknowledged} acknowledged, {dict(counts)}", flush=True)
        counts["acknowledged"] = self.acknowledged
        return counts

    def kill_during(self, kind: str) -> list[str]:
        """Starts a process, kills it in or soon after a change of this kind, and checks what is left.

        Returns the kinds of what was under way. Raises AssertionError.
        """
        pending = self._killed_at(kind)
        self._settle([one for one in pending if isinstance(one, Switch)])
        changes = [one for one in pending if isinstance(one, Change)]
        assert len(changes) <= 1, "changes come one after another"
        # Opened before anything else reads it: the write-ahead log must be recovered by what serves.
        with self._opened(None) as corpus:
            for change in changes:
                self._finish(corpus, change)
            if self._last is not None and self._last[0].folder == self.active:
                again, answer = self._last
                assert apply(corpus, again) == answer, "a repeated request_id was done twice"
            self._check(corpus)
        self._check_others()
        return [one.kind for one in pending]

    @contextlib.contextmanager
    def _opened(self, name: str | None) -> Iterator[Corpus]:
        """Opens a folder's corpus, None the one that serves."""
        corpus = open_active(self.home) if name is None else LocalCorpus(self._root / name)
        try:
            yield corpus
        finally:
            corpus.close()

    def _check_others(self) -> None:
        for name in set(FOLDERS) - {self.active}:
            with self._opened(name) as other:
                self._check(other)
        for name in FOLDERS:
            verify_index(self._root / name, lambda step: None)

    def _start(self, events: Connection, seed: int, switches: bool) -> Any:
        """Starts the process that changes the corpus."""
        process = self._processes.Process(
            target=change_until_killed, args=(self.home, events, seed, switches), daemon=True
        )
        process.start()
        return process

    def _killed_at(self, kind: str) -> list[Change | Switch]:
        """Runs the process until it is killed; returns what it had begun and not acknowledged."""
        ours, theirs = self._processes.Pipe(duplex=False)
        process = self._start(theirs, self._random.randrange(2**31), kind in {"compact", "activate"})
        theirs.close()
        begun: dict[str, tuple[Change | Switch, float]] = {}
        skipped = self._random.randrange(4)
        kill_at_s = time.monotonic() + 60
        killed = False
        try:
            while True:
                left_s = kill_at_s - time.monotonic()
                if not killed and (left_s <= 0 or not ours.poll(left_s)):
                    killed = True
                    self._kill(process)
                    continue
                heard = self._hear(ours, begun)
                if not killed and heard == kind:
                    skipped -= 1
                    if skipped < 0:
                        kill_at_s = time.monotonic() + self._random.uniform(0, 1.2) * self._took_s[kind]
                        skipped = sys.maxsize
        except (EOFError, OSError):
            pass
        finally:
            process.kill()
            process.join()
            ours.close()
        assert killed, f"the process ended by itself: exit code {process.exitcode}"
        return [one for one, _ in begun.values()]

    def _kill(self, process: Any) -> None:
        """Kills what this is about; the process in any case."""
        process.kill()

    def _hear(self, events: Connection, begun: dict[str, tuple[Change | Switch, float]]) -> str:
        """Takes one event; returns the kind of what has begun, "" where something is done."""
        what, change, answer = events.recv()
        place = "change" if isinstance(change, Change) else "switch"
        if what == "begun":
            begun[place] = change, time.monotonic()
            return str(change.kind)
        _, began_s = begun.pop(place)
        self._took_s[change.kind] += 0.2 * (
            min(self.longest_s, time.monotonic() - began_s) - self._took_s[change.kind]
        )
        self.acknowledged += 1
        if isinstance(change, Change):
            self._note(change)
            self._last = change, answer
        elif change.kind == "activate":
            self.active = change.folder
        return ""

    def _note(self, change: Change) -> None:
        texts = self.texts[change.folder]
        for key, text in change.texts.items():
            if text is None:
                texts.pop(key, None)
            else:
                texts[key] = text

    def _settle(self, switches: list[Switch]) -> None:
        """An activation that was not acknowledged may have been done or not."""
        with self._opened(None) as corpus:
            found = corpus.folder.name
        allowed = {self.active, *(one.folder for one in switches if one.kind == "activate")}
        assert found in allowed, f"{found} serves, not {allowed}"
        self.active = found

    def _finish(self, corpus: Corpus, change: Change) -> None:
        """A change that was not acknowledged is there wholly or not at all; sent again, it is done once."""
        if change.folder == self.active:
            self._finish_in(corpus, change)
            return
        # It was written before the activation that followed it.
        with self._opened(change.folder) as other:
            self._finish_in(other, change)

    def _finish_in(self, corpus: Corpus, change: Change) -> None:
        now = _texts_of(corpus)
        before = dict(self.texts[change.folder])
        self._note(change)
        after = self.texts[change.folder]
        assert now in (before, after), f"half of {change} is there"
        sequence = corpus.sequence
        answer = apply(corpus, change)
        if now == after and now != before:
            assert corpus.sequence == sequence, "a repeated request_id was done twice"
        self._last = change, answer

    def _check(self, corpus: Corpus) -> None:
        """Holds a corpus against what was acknowledged, by listing, reading, searching."""
        wanted = self.texts[corpus.folder.name]
        found = _texts_of(corpus)
        lost = {key for key, text in wanted.items() if found.get(key) != text}
        assert not lost, f"acknowledged and lost: {sorted(lost)}"
        assert found.keys() == wanted.keys(), f"deleted and back: {sorted(found.keys() - wanted.keys())}"
        generation = corpus.generation
        index, store = generation.index, generation.store
        assert index.ntotal == len(store) == len(wanted)
        documents = store.documents_by_key(list(wanted))
        rows = [documents[key].row for key in wanted]
        vectors = np.stack([vector_of(text) for text in wanted.values()])
        assert np.array_equal(store.embeddings_of(rows), vectors), "embeddings and documents are mixed up"
        hits, _ = index.search(vectors[:16], len(wanted) + 5, SearchParameters())
        for hit in hits:
            returned = [row for row in hit.tolist() if row >= 0]
            assert len(returned) == len(set(returned)), "a document is found twice"
            assert set(returned) <= set(rows), "something deleted is found"
            assert not index.is_exhaustive or set(returned) == set(rows), (
                "an acknowledged document is not found"
            )


def build_tiny(folder: Path, documents: list[dict[str, str]], kind: str = "Flat") -> None:
    """Builds an index of documents that have a key, a title and a text; the corpus file lies beside it."""
    file = folder.with_suffix(".jsonl")
    lines = [json.dumps({**one, "embedding": vector_of(one["text"]).tolist()}) for one in documents]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_index(
        CorpusReader(file),
        folder,
        encoder=None,
        embedding_name=EMBEDDING.name,
        options=BuildOptions(kind=kind),
        progress=lambda stage, done, total: None,
    )


def _texts_of(corpus: Corpus) -> dict[str, str]:
    return {document.key: document.text for document in corpus.page(None, 10_000).documents}


def run(root: Path, kills: int, seed: int, *, say: bool = False) -> collections.Counter[str]:
    """Kills so many processes; returns how often each kind of change was under way. Raises AssertionError."""
    set_num_threads(1)
    return KilledCorpus(root, seed).kill_often(kills, say=say)
