"""Indexed metadata fields: filters on them read what they find, and mean what they meant without."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.corpus.base import Delete, NewDocument, Upsert
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import BuildError
from retriever_service.filters import AllOf, AnyOf, Equal, Filter, Not, OneOf, Range
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import cli
from retriever_service.store.filter_sql import where_clause
from retriever_service.store.live import LiveStore
from tests.retriever_service.tiny_models import make_documents, make_metadata, write_jsonl

DIM = 16
DOCUMENTS = make_documents(60, DIM)
Build = Callable[..., Snapshot]
FIELDS = ("year", "source.name", "it's")


@contextlib.contextmanager
def changed(folder: Path) -> Iterator[LiveStore]:
    """A corpus that was built, written to and deleted from."""
    with contextlib.closing(LocalCorpus(folder)) as corpus:
        added = [
            NewDocument(f"new-{row}", "", "text", json.dumps(make_metadata(row) | {"it's": row}))
            for row in range(20)
        ]
        vectors = np.random.default_rng(3).standard_normal((20, DIM)).astype(np.float32)
        corpus.upsert(Upsert("", "d", added, vectors, False, corpus.generation.manifest.embedding))
        corpus.delete(Delete("", "d", [(DOCUMENTS[row]["key"], "") for row in range(5)]))
        store = corpus.generation.store
        assert isinstance(store, LiveStore)
        yield store


def plan_of(store: LiveStore, condition: Filter) -> list[str]:
    clause, parameters = where_clause(condition, "metadata", store.indexed_fields)
    query = f"EXPLAIN QUERY PLAN SELECT row FROM documents WHERE {clause}"
    with contextlib.closing(store._connect()) as connection:
        return [step for *_, step in connection.execute(query, parameters)]


@pytest.fixture
def stores(tmp_path: Path, corpus: Path, build_corpus: Build) -> Iterator[tuple[LiveStore, LiveStore]]:
    """The same documents with indexes and without."""
    build_corpus(corpus, tmp_path / "indexed", filter_indexes=FIELDS)
    build_corpus(corpus, tmp_path / "plain")
    with changed(tmp_path / "indexed") as indexed, changed(tmp_path / "plain") as plain:
        yield indexed, plain


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (Equal("year", 1995), "filter:year (<expr>=?)"),
        (Range("year", gte=1991, lt=1995), "filter:year (<expr>>? AND <expr><?)"),
        (OneOf("year", (1991, "1992", 1993.0)), "filter:year (<expr>=?)"),
        (Equal("source.name", "source 3"), "filter:source.name (<expr>=?)"),
        (Equal("it's", 7), "filter:it's (<expr>=?)"),
        (AnyOf((Equal("year", 1991), Equal("source.name", "source 2"))), "filter:year (<expr>=?)"),
        (AllOf((Equal("year", 1991), Not(Equal("language", "fr")))), "filter:year (<expr>=?)"),
        (AllOf((Equal("language", "en"), Range("year", gt=2010))), "filter:year (<expr>>?)"),
    ],
)
def test_filter_on_an_indexed_field_reads_what_it_finds(
    stores: tuple[LiveStore, LiveStore], condition: Filter, index: str
) -> None:
    indexed, plain = stores
    plan = plan_of(indexed, condition)
    for table in ("built", "main.documents"):
        assert f"SEARCH {table} USING INDEX {index}" in plan
        assert any(step.startswith(f"SCAN {table}") for step in plan_of(plain, condition))
    assert not any(step.startswith("SCAN") for step in plan)
    found = indexed.rows_where(condition)
    assert len(found)
    np.testing.assert_array_equal(found, plain.rows_where(condition))


def test_indexes_are_of_no_use_to_a_negation_and_do_not_change_it(
    stores: tuple[LiveStore, LiveStore],
) -> None:
    condition = Not(AnyOf((Equal("year", 1995), Range("it's", gte=3))))
    indexed, plain = stores
    assert "SCAN built" in plan_of(indexed, condition)
    np.testing.assert_array_equal(indexed.rows_where(condition), plain.rows_where(condition))
    assert len(plain.rows_where(condition)) + len(plain.rows_where(condition.filter)) == 75


def test_command_indexes_the_fields_that_it_is_told(tmp_path: Path, corpus: Path) -> None:
    def build(fields: str) -> Any:
        arguments = ["build", "--input", str(corpus), "--output", str(tmp_path / "index")]
        return CliRunner().invoke(
            cli.app, [*arguments, "--embedding-model-name", "tiny", "--filter-indexes", fields]
        )

    assert build("year,language,year").exit_code == 0
    with contextlib.closing(LocalCorpus(tmp_path / "index")) as opened:
        store = opened.generation.store
        assert isinstance(store, LiveStore)
        assert store.indexed_fields == {"year", "language"}
    for wrong in ("year,", 'ye"ar', "a..b"):
        refused = build(wrong)
        assert isinstance(refused.exception, BuildError)
        assert "--filter-indexes: '" in refused.exception.message


def test_other_filter_indexes_make_another_build(tmp_path: Path, build_corpus: Build) -> None:
    """Otherwise a build that was killed would be gone on with, and end without them."""
    corpus = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    plain = build_corpus(corpus, tmp_path / "index")
    indexed = build_corpus(corpus, tmp_path / "index", filter_indexes=("year",))
    assert plain.manifest.files["documents.sqlite"] != indexed.manifest.files["documents.sqlite"]
