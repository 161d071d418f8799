"""The corpus of an index folder: what is acknowledged stays, what is deleted is gone, in every generation."""

import contextlib
import errno
import functools
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import AbortedError, CancelledByCallerError
from rag_serving.metrics import Metrics
from retriever_service.corpus import local
from retriever_service.corpus.base import Corpus, Delete, NewDocument, Upsert
from retriever_service.errors import (
    CompactionError,
    DamagedIndexError,
    DiskFullError,
    EtagError,
    KeyExistsError,
    ReadOnlyError,
    RequestIdReusedError,
)
from retriever_service.filters import Equal
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.manifest import Embedding
from retriever_service.index.snapshot import Snapshot
from retriever_service.metrics import RetrieverMetrics
from retriever_service.milvus.index import Matching
from retriever_service.recall_sampler import RecallSampler
from retriever_service.types import SearchParameters, Selection
from tests.retriever_service.tiny_models import make_documents

DIM = 16
KNOBS = SearchParameters()
DOCUMENTS = make_documents(60, DIM)
Build = Callable[..., Any]
Opened = Callable[..., contextlib.AbstractContextManager[Any]]


def vector(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def upsert(corpus: Corpus, *keys: str, seed: int = 0, request_id: str = "", **fields: Any) -> Any:
    etags = fields.pop("etags", [""] * len(keys))
    documents = [
        NewDocument(key, "", f"text of {key}, {seed}", '{"new": true}', etag)
        for key, etag in zip(keys, etags, strict=True)
    ]
    vectors = np.stack([vector(seed + place) for place in range(len(keys))])
    return corpus.upsert(
        Upsert(
            request_id,
            fields.pop("digest", "d"),
            documents,
            vectors,
            fields.pop("create_only", False),
            Embedding(name="tiny-encoder"),
        )
    )


def delete(corpus: Corpus, *keys: str, request_id: str = "") -> Any:
    return corpus.delete(Delete(request_id, "d", [(key, "") for key in keys]))


def found(corpus: Corpus, question: Any, n_docs: int = 3, selection: Selection | None = None) -> list[str]:
    generation = corpus.generation
    rows, _ = generation.index.search(question[None], n_docs, KNOBS, selection)
    documents = generation.store.documents_by_row([row for row in rows[0].tolist() if row >= 0])
    return [documents[row].key for row in rows[0].tolist() if row in documents]


def keys_of(corpus: Corpus) -> list[str]:
    keys: list[str] = []
    while True:
        page = corpus.page(keys[-1] if keys else None, 7)
        keys += [document.key for document in page.documents]
        if not page.more:
            return keys


def test_changes_are_seen_at_once_and_after_a_restart(opened: Opened, folder: Path) -> None:
    victim = DOCUMENTS[3]
    question = np.asarray(victim["embedding"], np.float32) * 10
    with opened(folder) as corpus:
        assert victim["key"] in found(corpus, question)
        written = upsert(corpus, "fresh", victim["key"], seed=5)
        assert (written.created, written.replaced, list(written.rows)) == (1, 1, [60, 61])
        assert found(corpus, vector(5) * 10)[0] == "fresh"
        assert found(corpus, vector(6) * 10)[0] == victim["key"]
        assert delete(corpus, victim["key"], "nobody").missing_keys == ["nobody"]
        for again in (corpus,):
            assert victim["key"] not in found(again, vector(6) * 10, n_docs=60)
            assert len(again.generation.store) == again.generation.index.ntotal == 60
    with opened(folder) as corpus:
        assert found(corpus, vector(5) * 10)[0] == "fresh"
        assert victim["key"] not in found(corpus, question, n_docs=60)
        assert keys_of(corpus) == sorted({one["key"] for one in DOCUMENTS} - {victim["key"]} | {"fresh"})
        assert upsert(corpus, "later").rows == [62], "a row is never given twice"
        document = corpus.generation.store.documents_by_key(["fresh"])["fresh"]
        assert document.metadata == '{"new": true}'


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("local", kind) for kind in ("Flat", "HNSW8", "IVF4,Flat", "IVF4,PQ4x4")]
    + [("milvus", kind) for kind in ("Flat", "HNSW8")],
    indirect=["backend"],
)
def test_compaction_changes_no_answer(
    opened: Opened, backend: str, kind: str, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    build_corpus(corpus, tmp_path / "index", kind=kind, nprobe=4)
    with opened(tmp_path / "index") as live:
        for step in range(10):
            upsert(live, f"fresh-{step}", DOCUMENTS[step]["key"], seed=100 + 2 * step)
        delete(live, "fresh-0", DOCUMENTS[1]["key"], DOCUMENTS[59]["key"])
        old = live.generation
        before = [set(found(live, vector(seed), 80)) for seed in range(5)]
        stages: list[str] = []
        generation = live.compact(lambda stage, done, total: stages.append(stage), threading.Event())
        assert (generation.number, generation.index.ntotal, live.pending_changes) == (2, 67, 0)
        assert [set(found(live, vector(seed), 80)) for seed in range(5)] == before
        assert ({"index", "publish", "load"} if backend == "local" else {"compact"}) <= set(stages)
        delete(live, "fresh-3")
        for one in (old, generation):
            rows = one.index.search(vector(106)[None], 80, KNOBS)[0][0]
            assert "fresh-3" not in {d.key for d in one.store.documents_by_row(rows.tolist()).values()}
    with opened(tmp_path / "index") as live:
        assert live.generation.number == 2
        assert "fresh-3" not in found(live, vector(106), 80)
        assert len(found(live, vector(0), 80)) == 66


def test_changes_during_a_compaction_are_in_neither_lost_nor_doubled(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        upsert(corpus, "before", seed=1)

        def meddle(stage: str, done: int, total: int | None) -> None:
            if stage in {"index", "compact"} and done == 0:
                upsert(corpus, "during", seed=2)
                delete(corpus, "before", DOCUMENTS[0]["key"])

        corpus.compact(meddle, threading.Event())
        assert sorted(found(corpus, vector(2), 80)) == keys_of(corpus)
        assert "during" in keys_of(corpus)
        assert "before" not in keys_of(corpus)


def test_a_cancelled_compaction_leaves_nothing(opened: Opened, folder: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with opened(folder) as corpus:
        upsert(corpus, "fresh")
        with pytest.raises(CancelledByCallerError):
            corpus.compact(lambda *_: None, cancelled)
        assert not (folder / ".compacting").exists()
        assert corpus.generation.number == 1
        assert "fresh" in keys_of(corpus)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_compaction_that_finds_no_room_for_its_last_file_leaves_nothing(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder had its name already, and stayed, on a disk that was full."""

    def full(file: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(folder) as corpus:
        upsert(corpus, "fresh")
        with monkeypatch.context() as patched:
            patched.setattr("retriever_service.index.snapshot.write_durably", full)
            with pytest.raises(DiskFullError):
                corpus.compact(lambda *_: None, threading.Event())
        assert [path.name for path in folder.glob("generation-*")] == ["generation-000001"]
        # As SIGKILL leaves it.
        shutil.copytree(folder / "generation-000001", folder / "generation-000002")
        (folder / "generation-000002" / "recipe.sha256").unlink()
        assert corpus.compact(lambda *_: None, threading.Event()).number == 2
        assert "fresh" in keys_of(corpus)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_full_disk_is_not_taken_for_one_that_nobody_writes(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that opened while the disk was full read the file without its write-ahead log."""

    def full(file: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(folder) as corpus, ThreadPoolExecutor(1) as another_thread:
        upsert(corpus, "fresh")
        monkeypatch.setattr(Path, "touch", full)
        assert "fresh" in another_thread.submit(keys_of, corpus).result()


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_change_is_synced_before_it_is_acknowledged(opened: Opened, folder: Path) -> None:
    """SQLite's default in a write-ahead log is to sync at checkpoints alone: a loss of power would undo changes."""
    with opened(folder) as corpus:
        upsert(corpus, "fresh")
        connection = corpus._writer._connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert not connection.in_transaction


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_compaction_never_overrides_a_newer_build(
    opened: Opened, folder: Path, corpus: Path, build_corpus: Build
) -> None:
    with opened(folder) as live:
        upsert(live, "fresh")
        build_corpus(corpus, folder)
        with pytest.raises(CompactionError, match="activate that one first"):
            live.compact(lambda *_: None, threading.Event())


@pytest.mark.parametrize("backend", ["local"], indirect=True)
@pytest.mark.parametrize("step", ["renumber", "compact"])
def test_a_generation_given_up_leaves_the_one_before_as_the_newest(
    opened: Opened, folder: Path, step: str
) -> None:
    """Its number was named on, with no index behind it, and later ones were counted from it."""
    with opened(folder) as corpus:
        upsert(corpus, "fresh", seed=3)
        before = corpus.generation
        compact = functools.partial(corpus.compact, lambda *_: None, threading.Event())
        given_up = corpus.renumber(7) if step == "renumber" else compact()
        corpus.release(given_up)
        assert corpus.generation == before
        assert corpus.pending_changes == 1
        upsert(corpus, "later", seed=4)
        assert [found(corpus, vector(seed) * 10)[0] for seed in (3, 4)] == ["fresh", "later"]
        assert compact().number == (2 if step == "renumber" else 3)
        assert corpus.pending_changes == 0


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_a_reader_that_gave_a_generation_up_opens_it_again(opened: Opened, folder: Path) -> None:
    with opened(folder) as writer, contextlib.ExitStack() as stack:
        reader = stack.enter_context(opened(folder, take_changes=False))
        upsert(writer, "fresh", seed=3)
        writer.compact(lambda *_: None, threading.Event())
        reader.release(reader.open_newer())
        assert (reader.generation.number, reader.pending_changes) == (1, 1)
        assert reader.open_newer().number == 2
        assert reader.pending_changes == 0


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_what_was_published_and_could_not_be_opened_stops_no_compaction_and_no_activation(
    opened: Opened, folder: Path
) -> None:
    """CURRENT named another generation than the one that served, until the folder was activated: as a second corpus."""
    fails = False

    def load_index(file: Path) -> FaissIndex:
        if fails:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return FaissIndex.load(file)

    with opened(folder, load_index=load_index) as corpus:
        before = corpus.generation
        for number in (3, 4):
            upsert(corpus, "fresh", seed=number)
            fails = True
            with pytest.raises(DiskFullError):
                corpus.compact(lambda *_: None, threading.Event())
            fails = False
            assert Snapshot.open(folder).manifest.generation == (2 if number == 3 else 4)
            assert corpus.has_newest_build()
            if number == 3:
                assert corpus.compact(lambda *_: None, threading.Event()).number == 3
            else:
                activated = corpus.renumber(9)
                assert (activated.number, activated.manifest.generation) == (9, 4)
            delete(corpus, "fresh")
            for one in (before, corpus.generation):
                rows = one.index.search(vector(number)[None] * 10, 1, KNOBS)[0][0].tolist()
                assert one.store.documents_by_row(rows)[rows[0]].key != "fresh"
        upsert(corpus, "last")
        assert corpus.compact(lambda *_: None, threading.Event()).number == 10


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_two_builds_leave_the_generation_that_serves(
    opened: Opened, folder: Path, corpus: Path, build_corpus: Build
) -> None:
    """Two builds without a restart removed the generation that a retriever had open."""
    with opened(folder) as live:
        upsert(live, "fresh", seed=3)
        build_corpus(corpus, folder, keep_generations=1)
        build_corpus(corpus, folder, keep_generations=1)
        assert (folder / "generation-000001").is_dir()
        assert found(live, vector(3) * 10)[0] == "fresh"
    build_corpus(corpus, folder, keep_generations=1)
    assert not (folder / "generation-000001").exists()
    assert not list(folder.glob("live-000001*"))


def test_request_ids_and_etags_keep_changes_apart(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        first = upsert(corpus, "a", "b", request_id="r1")
        assert upsert(corpus, "a", "b", request_id="r1") == first
        with pytest.raises(RequestIdReusedError):
            upsert(corpus, "c", request_id="r1", digest="other")
        with pytest.raises(KeyExistsError):
            upsert(corpus, "c", "a", create_only=True)
        with pytest.raises(EtagError, match="the stored one is"):
            upsert(corpus, "c", "a", etags=["", "stale"])
        assert "c" not in keys_of(corpus), "half a batch was written"
        second = upsert(corpus, "a", etags=[first.etags[0]], seed=9)
        with pytest.raises(EtagError):
            corpus.delete(Delete("", "d", [("a", first.etags[0])]))
        assert corpus.delete(Delete("r2", "d", [("a", second.etags[0])])).deleted == 1
    with opened(folder) as corpus:
        assert upsert(corpus, "a", "b", request_id="r1") == first
        assert "a" not in keys_of(corpus), "a remembered request was done again"


def test_a_batch_for_another_index_is_refused(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        batch = Upsert("", "d", [NewDocument("a", "", "t")], vector(0)[None], False, Embedding(name="other"))
        with pytest.raises(AbortedError, match="send the batch again"):
            corpus.upsert(batch)


def test_only_one_writes_and_the_other_follows(opened: Opened, folder: Path) -> None:
    with opened(folder) as writer, contextlib.ExitStack() as stack:
        holder = stack.enter_context(opened(folder, take_changes=False))
        assert "read-only" in str(holder.read_only_reason)
        upsert(writer, "fresh", seed=4)
        delete(writer, DOCUMENTS[0]["key"])
        assert holder.follow()
        assert found(holder, vector(4) * 10)[0] == "fresh"
        assert DOCUMENTS[0]["key"] not in found(holder, vector(4), 80)
        with pytest.raises(ReadOnlyError):
            upsert(holder, "no")


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_one_generation_alone_takes_no_changes(opened: Opened, folder: Path) -> None:
    with opened(folder) as writer:
        upsert(writer, "fresh", seed=4)
    with opened(folder / "generation-000001") as one:
        assert "only an index folder" in str(one.read_only_reason)
        assert found(one, vector(4) * 10)[0] == "fresh", "a generation alone showed what was changed since"


def test_a_reader_that_was_there_before_the_first_change_follows_too(opened: Opened, folder: Path) -> None:
    """It read the build alone for as long as it ran."""
    with opened(folder, take_changes=False) as holder, ThreadPoolExecutor(1) as another_thread:
        assert len(another_thread.submit(keys_of, holder).result()) == 60
        assert not holder.follow()
        with opened(folder) as writer:
            assert not holder.follow()
            upsert(writer, "fresh", seed=4)
            delete(writer, DOCUMENTS[0]["key"])
            assert holder.follow()
            assert found(holder, vector(4) * 10)[0] == "fresh"
            assert len(another_thread.submit(keys_of, holder).result()) == 60
            assert DOCUMENTS[0]["key"] not in found(holder, vector(4), 80)
            upsert(writer, "later", seed=5)
            assert holder.follow()
            assert "later" in keys_of(holder)


def test_selections_reach_the_snapshot_and_the_fresh_documents(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        upsert(corpus, "fresh", DOCUMENTS[5]["key"], seed=7)
        rows = np.asarray([2, 5, 6, 60, 61], np.int64)
        keys = {DOCUMENTS[2]["key"], DOCUMENTS[6]["key"], "fresh", DOCUMENTS[5]["key"]}
        assert set(found(corpus, vector(7), 80, Selection(rows))) == keys
        corpus.compact(lambda *_: None, threading.Event())
        delete(corpus, "fresh")
        assert set(found(corpus, vector(7), 80, Selection(rows))) == keys - {"fresh"}


def test_selection_finds_either_version_of_a_document_that_is_overwritten_around_it(
    opened: Opened, folder: Path
) -> None:
    """Evaluated beside the index, it held the version that the index did not show yet, or showed no more."""
    with opened(folder) as writer, contextlib.ExitStack() as stack:
        corpora = [writer, stack.enter_context(opened(folder, take_changes=False))]

        def found_once(selections: list[Selection]) -> None:
            for corpus, selection in zip(corpora, selections, strict=True):
                index, store = corpus.generation.index, corpus.generation.store
                rows = index.search(vector(4)[None], 60, KNOBS, selection)[0][0]
                rows = rows[rows >= 0]
                documents = store.documents_by_row(rows.tolist(), replaced=True).values()
                assert [document.key for document in documents] == ["k"]
                if not isinstance(selection, Matching):
                    np.testing.assert_array_equal(index.living(selection), rows)

        upsert(writer, "k", seed=4)
        corpora[1].follow()
        for _ in range(3):
            upsert(writer, "k", seed=4)
            selections = [corpus.generation.store.select(Equal("new", True)) for corpus in corpora]
            found_once(selections)
            upsert(writer, "k", seed=4)
            found_once(selections)
            corpora[1].follow()
            found_once(selections)
        delete(writer, "k")
        corpora[1].follow()
        for corpus, selection in zip(corpora, selections, strict=True):
            assert found(corpus, vector(4), 60, selection) == []


@pytest.mark.parametrize("backend", ["local"], indirect=True)
@pytest.mark.parametrize("vectors_per_chunk", [2, 100])
def test_a_reader_that_follows_finds_the_old_or_the_new_version_at_any_moment(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch, vectors_per_chunk: int
) -> None:
    """It hid all that was replaced before it read, and added, the first new version."""
    monkeypatch.setattr(local, "_VECTORS_PER_CHUNK", vectors_per_chunk)
    keys = [one["key"] for one in DOCUMENTS[:5]]
    seen: list[list[str]] = []
    with opened(folder) as writer, contextlib.ExitStack() as stack:
        holder = stack.enter_context(opened(folder, take_changes=False))
        index, store = holder.generation.index, holder.generation.store
        change = index.change

        def change_and_look(*changes: Any) -> None:
            change(*changes)
            rows = index.search(vector(0)[None], 80, KNOBS)[0][0].tolist()
            documents = store.documents_by_row(rows, replaced=True)
            seen.append(sorted(documents[row].key for row in rows if row in documents))

        upsert(writer, *keys, "new", seed=1)
        upsert(writer, *keys, "newer", seed=2)
        delete(writer, "new", DOCUMENTS[9]["key"])
        monkeypatch.setattr(index, "change", change_and_look)
        assert holder.follow()
    lasting = {one["key"] for one in DOCUMENTS} - {DOCUMENTS[9]["key"]}
    for found_then in seen:
        assert len(found_then) == len(set(found_then))
        assert lasting <= set(found_then)
    assert set(seen[-1]) == lasting | {"newer"}


def test_many_hidden_fresh_documents_hide_none_that_lives(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        for round_ in range(3):
            for part in range(0, 600, 200):
                upsert(corpus, *(f"k{place}" for place in range(part, part + 200)), seed=1000 * round_)
        assert corpus.generation.index.ntotal == 660
        assert sorted(found(corpus, vector(1), 700)) == keys_of(corpus)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_changes_of_another_build_are_refused(opened: Opened, folder: Path) -> None:
    with opened(folder) as corpus:
        upsert(corpus, "fresh")
    with contextlib.closing(sqlite3.connect(folder / "live-000001.sqlite")) as connection, connection:
        connection.execute("UPDATE facts SET value = 'sha256:0' WHERE name = 'base'")
    with pytest.raises(DamagedIndexError, match="live-000001"), opened(folder):
        pass


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_any_damaged_file_of_a_compaction_is_named(opened: Opened, folder: Path, tmp_path: Path) -> None:
    with opened(folder) as corpus:
        upsert(corpus, "fresh")
        corpus.compact(lambda *_: None, threading.Event())
    for name in (
        "generation-000002/index.faiss",
        "generation-000002/rows.npy",
        "generation-000001/documents.sqlite",
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(DamagedIndexError, match=Path(name).name), opened(copy):
            pass
        shutil.rmtree(copy)


@pytest.mark.parametrize("backend", ["local"], indirect=True)
def test_live_recall_is_measured_among_the_documents_that_live(
    opened: Opened, tmp_path: Path, corpus: Path, build_corpus: Build
) -> None:
    """An answer whose document was deleted before it was sampled would have counted as a bad search."""
    build_corpus(corpus, tmp_path / "index", kind="HNSW32", ef_search=200)
    metrics = RetrieverMetrics(Metrics("retriever"))

    def sampled() -> tuple[float, float]:
        (family,) = metrics.live_recall_ratio.collect()
        values = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
        return values["count"], values["sum"]

    with opened(tmp_path / "index") as live, ThreadPoolExecutor(1) as pool:
        upsert(live, "fresh", seed=5)
        delete(live, DOCUMENTS[3]["key"], DOCUMENTS[7]["key"])
        generation = live.generation
        sampler = RecallSampler(generation.index, generation.store, metrics, pool, rate=1.0)
        question = vector(5)[None] * 10
        rows, _ = generation.index.search(question, 59, KNOBS)
        sampler.offer(question, 59, rows[:, :59], None)
        pool.submit(lambda: None).result()
        assert sampled() == (1, 1.0)
        delete(live, "fresh")
        sampler._rests_until_s = 0.0
        sampler.offer(question, 59, rows[:, :59], None)
        pool.submit(lambda: None).result()
        assert sampled() == (1, 1.0)
