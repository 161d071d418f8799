"""`rag-index tune`: recall against latency over the knobs."""

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import BuildError
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import cli
from retriever_service.ingest.tune import Setting, Trial, exact_rows, recommended, sampled_questions, tune
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Metric
from tests.retriever_service.tiny_models import embeddings_of, make_documents, write_jsonl

Build = Callable[..., Snapshot]
DOCUMENTS = make_documents(600, 16, seed=2)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW8"])
def test_widest_setting_finds_nearly_all_and_recall_grows(
    tmp_path: Path, build_corpus: Build, kind: str, metric: Metric
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    snapshot = build_corpus(corpus, tmp_path / "index", kind=kind, metric=metric)
    store = SqliteStore(snapshot.documents_file, 16)
    questions = sampled_questions(store, 40)
    heard: list[Setting] = []
    index = FaissIndex.load(snapshot.index_file)
    trials = tune(index, store, questions, 5, lossy="PQ" in kind, progress=heard.append)
    store.close()
    assert [trial.setting for trial in trials] == heard
    assert trials[-1].recall > 0.97
    assert trials[0].recall <= trials[-1].recall
    assert len(trials) == 1 or kind != "Flat"
    best = recommended(trials, 0.9)
    assert best.recall >= 0.9


def test_every_cell_of_an_index_is_tried_where_fewer_do_not_find_all(
    tmp_path: Path, build_corpus: Build
) -> None:
    """Powers of two alone went no further than 16 of 30."""
    snapshot = build_corpus(
        write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), tmp_path / "index", kind="IVF30,Flat"
    )
    store = SqliteStore(snapshot.documents_file, 16)
    index = FaissIndex.load(snapshot.index_file)
    # Of documents all of which are asked for, each cell has some.
    trials = tune(index, store, sampled_questions(store, 5), 600, lossy=False, progress=lambda setting: None)
    store.close()
    assert [trial.setting.nprobe for trial in trials] == [1, 2, 4, 8, 16, 30]
    assert trials[-1].recall == 1


@pytest.mark.parametrize(
    ("kind", "is_lossy"), [("PCA4,Flat", True), ("IVF4,RaBitQ", True), ("IVF4,Flat", False)]
)
def test_candidates_are_rescored_wherever_scores_are_approximate(
    tmp_path: Path, build_corpus: Build, kind: str, is_lossy: bool
) -> None:
    """Only kinds with PQ or SQ in their names were."""
    build_corpus(write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), tmp_path / "index", kind=kind)
    arguments = ["tune", str(tmp_path / "index"), "--json", "--num-questions", "20"]
    found = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    factors = {trial["setting"]["rescore_factor"] for trial in found["trials"]}
    assert (len(factors) > 1) is is_lossy


@pytest.mark.parametrize(
    ("target", "reached", "line"),
    [
        ("0.95", True, "the target recall 0.95 is reached"),
        ("1", False, "no setting tried reaches the target recall 1:"),
    ],
)
def test_command_says_whether_the_target_is_reached(
    tmp_path: Path,
    build_corpus: Build,
    target: str,
    reached: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.tuning, "tune", lambda *_, **__: [Trial(Setting(8), 0.96, 1.0, 1.0, 1.0)])
    monkeypatch.setenv("COLUMNS", "120")
    build_corpus(write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), tmp_path / "index")
    arguments = ["tune", str(tmp_path / "index"), "--target-recall", target]
    assert line in CliRunner().invoke(cli.app, arguments).stdout
    assert json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)["reached"] is reached


def test_exact_rows_are_brute_force(tmp_path: Path, build_corpus: Build) -> None:
    snapshot = build_corpus(write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), tmp_path / "index")
    store = SqliteStore(snapshot.documents_file, 16)
    vectors = embeddings_of(DOCUMENTS)
    questions = sampled_questions(store, 10)
    for metric, far in (
        (Metric.INNER_PRODUCT, -questions @ vectors.T),
        (Metric.L2, np.linalg.norm(questions[:, None] - vectors[None], axis=2)),
    ):
        np.testing.assert_array_equal(exact_rows(store, questions, 3, metric), np.argsort(far, axis=1)[:, :3])
    store.close()


def test_fastest_that_reaches_the_recall_is_recommended() -> None:
    slow, fast, poor = (
        Trial(Setting(nprobe), recall, latency, latency, 1.0)
        for nprobe, recall, latency in ((8, 0.99, 3.0), (4, 0.96, 2.0), (1, 0.5, 1.0))
    )
    assert recommended([slow, fast, poor], 0.95) is fast
    assert recommended([fast, poor], 0.999) is fast


def test_command_prints_table_json_and_plot(tmp_path: Path, build_corpus: Build) -> None:
    pytest.importorskip("matplotlib")
    corpus = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    build_corpus(corpus, tmp_path / "index", kind="IVF8,PQ4x4")
    run, folder = CliRunner(), str(tmp_path / "index")
    told = run.invoke(cli.app, ["tune", folder, "--num-questions", "20", "--threads", "1"])
    assert told.exit_code == 0, told.output
    assert "recommended" in told.stdout
    plot = tmp_path / "plot.svg"
    arguments = ["tune", folder, "--json", "--questions", str(corpus), "--plot", str(plot)]
    told = run.invoke(cli.app, [*arguments, "--num-questions", "20"])
    found = json.loads(told.stdout)
    assert found["recommended"] in found["trials"]
    assert found["recommended"]["recall"] >= 0.95
    assert plot.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(("kind", "expected"), [("Flat", 1.0), ("IVF8,PQ4x4", 0.9)])
def test_documents_that_live_now_are_what_a_changed_index_is_tuned_on(
    tmp_path: Path, build_corpus: Build, kind: str, expected: float
) -> None:
    """A compaction's rows are not its places: searches of one and truth of the other would have nothing in common."""
    folder = tmp_path / "index"
    build_corpus(write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), folder, kind=kind)
    with contextlib.closing(LocalCorpus(folder)) as corpus:
        embedding = corpus.generation.manifest.embedding

        def write(first: int) -> None:
            vectors = np.random.default_rng(first).standard_normal((100, 16)).astype(np.float32)
            added = [NewDocument(f"new-{first + place}", "", "text") for place in range(100)]
            corpus.upsert(Upsert("", "d", added, vectors, False, embedding))

        corpus.delete(Delete("", "d", [(document["key"], "") for document in DOCUMENTS[:100]]))
        write(0)
        corpus.compact(lambda *_: None, threading.Event())
        corpus.delete(Delete("", "d", [(document["key"], "") for document in DOCUMENTS[100:150]]))
        write(100)
        told = CliRunner().invoke(cli.app, ["tune", str(folder), "--json", "--num-questions", "40"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert max(trial["recall"] for trial in found["trials"]) >= expected


def test_questions_that_do_not_fit_are_refused(tmp_path: Path, build_corpus: Build) -> None:
    build_corpus(write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), tmp_path / "index")
    other = write_jsonl(tmp_path / "q.jsonl", [{"text": "a", "embedding": [1.0]}])
    bare = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    for questions, said in ((other, "do not fit an index of dimension 16"), (bare, "needs an embedding")):
        told = CliRunner().invoke(cli.app, ["tune", str(tmp_path / "index"), "--questions", str(questions)])
        assert isinstance(told.exception, BuildError)
        assert said in told.exception.message
