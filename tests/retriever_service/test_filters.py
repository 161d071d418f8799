"""Metadata filters: one meaning, whoever evaluates them."""

import json
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from rag.filter.v1 import filter_pb2
from rag_client.filters import metadata_filter
from rag_serving.errors import InvalidArgumentError
from retriever_service.filter_wire import (
    MAX_FILTER_CONDITIONS,
    MAX_FILTER_DEPTH,
    MAX_FILTER_VALUES,
    read_filter,
)
from retriever_service.filters import AllOf, AnyOf, Equal, Filter, Not, OneOf, Range, kind_of, matches
from retriever_service.index.manifest import Embedding, Manifest
from retriever_service.milvus.connection import MilvusAddress, MilvusConnection
from retriever_service.milvus.entities import entity
from retriever_service.milvus.schema import create_documents
from retriever_service.milvus.state import Checkpoint, Shown, State
from retriever_service.milvus.store import MilvusStore
from retriever_service.milvus.terms import term
from retriever_service.store.sqlite import SqliteStore, SqliteWriter
from retriever_service.types import Metric
from tests.retriever_service.milvus_server import MilvusServer
from tests.retriever_service.tiny_models import make_metadata

METADATA: list[dict[str, Any] | None] = [None if row % 11 == 10 else make_metadata(row) for row in range(60)]
METADATA += [
    {},
    {"year": "1990", "language": "q\"uo'te % _", "a.b": 1},
    {"year": 2**62},
    {"language": "zß中\U0001f600"},
]
NULS: list[dict[str, Any]] = [
    {"language": text, "year": 1990}
    for text in ("e", "e\0", "e\0n", "e\1", "e\1\0", "e\0\1", "\0", "e\\u0000", "e\\\0")
]
METADATA += NULS

scalars = st.one_of(
    st.sampled_from(["en", "de", "1", "source 2", "zß中\U0001f600", "q\"uo'te % _", "e", "e\0", "e\0n"]),
    st.sampled_from([0, 1, 1990, 2000, 2**62, -(2**63), 1.0, 1.5, 2.25, 1e300]),
    st.booleans(),
)
fields = st.sampled_from(
    ["language", "year", "weight", "open", "source.name", "source", "mixed", "no", "year.no"]
)
numbers = st.sampled_from([0, 1, 1995, 2000.5, 2**62, 3.5])
texts = st.sampled_from(["", "de", "en", "source 3", "中", "e", "e\0", "e\0n", "e\1"])
bounds = st.one_of(
    *(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("gt", "gte", "lt", "lte"), values)).filter(bool)
        for values in (numbers, texts)
    )
)
leaves = st.one_of(
    st.builds(Equal, fields, scalars),
    st.builds(OneOf, fields, st.lists(scalars, min_size=1, max_size=4).map(tuple)),
    st.builds(lambda field, given: Range(field, **given), fields, bounds),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(AllOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def milvus_store(milvus: MilvusServer) -> Iterator[MilvusStore]:
    manifest = Manifest(
        generation=1,
        created_at="",
        created_by="",
        kind="Flat",
        metric=Metric.L2,
        dimension=2,
        ntotal=len(METADATA),
        embedding=Embedding(name="none"),
        files={},
    )
    connection = MilvusConnection(MilvusAddress(milvus.uri))
    create_documents(connection, "filters", manifest)
    vector = np.zeros(2, np.float32)
    entities = [
        entity("", row, f"doc-{row}", "", "", None if one is None else json.dumps(one), vector)
        for row, one in enumerate(METADATA)
    ]
    connection.upsert("filters", entities)
    state = State.of(Checkpoint(next_row=len(METADATA), num_documents=len(METADATA)), [])
    yield MilvusStore(connection, "filters", 2, Shown(state), "")
    connection.close()


@pytest.fixture(scope="module", params=[(), ("year", "mixed", "source.name", "language")])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SqliteStore:
    """Without indexes, and with some: they change what is read, never what is found."""
    file = tmp_path_factory.mktemp("filters") / "documents.sqlite"
    writer = SqliteWriter(file)
    documents = [
        (f"doc-{row}", "", "", None if one is None else json.dumps(one)) for row, one in enumerate(METADATA)
    ]
    writer.append(documents, np.zeros((len(documents), 2), np.float32))
    writer.finish(request.param)
    return SqliteStore(file, 2)


@settings(max_examples=300, deadline=None)
@given(condition=trees)
def test_sqlite_finds_the_documents_that_the_filter_means(store: SqliteStore, condition: Filter) -> None:
    meant = [row for row, metadata in enumerate(METADATA) if matches(condition, metadata or {})]
    assert store.rows_where(condition).tolist() == meant


@settings(max_examples=300, deadline=None)
@given(condition=trees)
def test_milvus_finds_the_documents_that_the_filter_means(
    milvus_store: MilvusStore, condition: Filter
) -> None:
    meant = [row for row, metadata in enumerate(METADATA) if matches(condition, metadata or {})]
    assert milvus_store.rows_where(condition).tolist() == meant


@given(st.lists(scalars, min_size=2, max_size=2))
def test_terms_of_a_kind_have_the_order_of_their_values(values: list[Any]) -> None:
    one, other = values
    if kind_of(one) == kind_of(other):
        assert (term(one) < term(other)) == (one < other)
        assert (term(one) == term(other)) == (one == other)
    else:
        assert term(one) != term(other)


def test_one_and_true_and_one_as_text_are_three_values() -> None:
    assert matches(Equal("x", 1), {"x": 1.0})
    assert not matches(Equal("x", 1), {"x": True})
    assert not matches(Equal("x", True), {"x": 1})
    assert not matches(Equal("x", "1"), {"x": 1})


def test_negation_holds_for_documents_that_lack_the_field(store: SqliteStore) -> None:
    """NOT of SQL's NULL is NULL: a document without the field was in neither the filter nor its negation."""
    lacking = len(METADATA) - len(store.rows_where(Equal("year", 1990)))
    assert len(store.rows_where(Not(Equal("year", 1990)))) == lacking


@pytest.mark.parametrize("text", [one["language"] for one in NULS])
def test_texts_with_nul_are_compared_whole(store: SqliteStore, milvus_store: MilvusStore, text: str) -> None:
    """SQLite ended them at their NUL: "e\\0n" was found as "e", and not as itself."""
    conditions: list[Filter] = [Equal("language", text), OneOf("language", (text, "en"))]
    conditions += [Range("language", **{bound: text}) for bound in ("gt", "gte", "lt", "lte")]
    for condition in conditions:
        meant = [row for row, metadata in enumerate(METADATA) if matches(condition, metadata or {})]
        assert store.rows_where(condition).tolist() == meant
        assert store.rows_where(Not(condition)).tolist() == sorted({*range(len(METADATA))} - {*meant})
        assert milvus_store.rows_where(condition).tolist() == meant


def value(given: Any) -> filter_pb2.Value:
    return metadata_filter({"x": given}).equal.value


def nested(depth: int) -> filter_pb2.Filter:
    found = metadata_filter({"x": 1})
    for _ in range(depth - 1):
        found = filter_pb2.Filter(negation=found)
    return found


BAD: list[tuple[filter_pb2.Filter, str]] = [
    (filter_pb2.Filter(), "filter"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(value=value(1))), "filter.equal.field"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(field="a..b", value=value(1))), "filter.equal.field"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(field='a"b', value=value(1))), "filter.equal.field"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(field="a\0b", value=value(1))), "filter.equal.field"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(field="x" * 257, value=value(1))), "filter.equal.field"),
    (filter_pb2.Filter(equal=filter_pb2.Equal(field="x")), "filter.equal.value"),
    (metadata_filter({"x": float("nan")}), "filter.equal.value"),
    (metadata_filter({"x": float("-inf")}), "filter.equal.value"),
    (metadata_filter({"x": "y" * 4097}), "filter.equal.value"),
    (filter_pb2.Filter(range=filter_pb2.Range(field="x")), "filter.range"),
    (filter_pb2.Filter(range=filter_pb2.Range(field="x", gt=value(True))), "filter.range.gt"),
    (filter_pb2.Filter(range=filter_pb2.Range(field="x", gte=value(1), lt=value("2"))), "filter.range.lt"),
    (filter_pb2.Filter(one_of=filter_pb2.OneOf(field="x")), "filter.one_of.values"),
    (
        filter_pb2.Filter(one_of=filter_pb2.OneOf(field="x", values=[value(1), filter_pb2.Value()])),
        "filter.one_of.values[1]",
    ),
    (filter_pb2.Filter(all_of=filter_pb2.Filters()), "filter.all_of.filters"),
    (filter_pb2.Filter(negation=filter_pb2.Filter()), "filter.negation"),
    (
        metadata_filter({"$or": [{"x": 1}, {"$and": [{"y": {"$in": ["a"]}}, {"z": float("inf")}]}]}),
        "filter.any_of.filters[1].all_of.filters[1].equal.value",
    ),
    (nested(MAX_FILTER_DEPTH + 1), "filter" + ".negation" * MAX_FILTER_DEPTH),
    (
        metadata_filter({"$and": [{"x": 1}] * MAX_FILTER_CONDITIONS}),
        f"filter.all_of.filters[{MAX_FILTER_CONDITIONS - 1}]",
    ),
    (
        metadata_filter({"x": {"$in": list(range(MAX_FILTER_VALUES + 1))}}),
        f"filter.one_of.values[{MAX_FILTER_VALUES}]",
    ),
]


@pytest.mark.parametrize(("message", "field"), BAD)
def test_bad_filter_is_refused_by_the_path_of_its_field(message: filter_pb2.Filter, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_filter(message)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_largest_filters_that_are_allowed_are_read_and_evaluated(
    store: SqliteStore, milvus_store: MilvusStore
) -> None:
    """Backends have limits of their own on depth and parameters; a filter that passed the checks must meet none."""
    deep = read_filter(nested(MAX_FILTER_DEPTH))
    wide = read_filter(metadata_filter({"$or": [{"x": 1}] * (MAX_FILTER_CONDITIONS - 1)}))
    many = read_filter(metadata_filter({"year": {"$in": list(range(1990, 1990 + MAX_FILTER_VALUES))}}))
    for one in (store, milvus_store):
        assert len(one.rows_where(deep)) == len(METADATA)
        assert len(one.rows_where(wide)) == 0
        assert len(one.rows_where(many)) == sum(
            (metadata or {}).get("year", 0) in range(1990, 2990) for metadata in METADATA
        )


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"a": 1}, Equal("a", 1)),
        ({"a": {"$eq": True}}, Equal("a", True)),
        ({"a": {"$ne": "x"}}, Not(Equal("a", "x"))),
        ({"a": {"$gte": 1, "$lt": 2.5}}, Range("a", gte=1, lt=2.5)),
        ({"a": {"$in": ["x", 2]}}, OneOf("a", ("x", 2))),
        ({"a": {"$nin": ["x"]}}, Not(OneOf("a", ("x",)))),
        ({"a": 1, "b": 2}, AllOf((Equal("a", 1), Equal("b", 2)))),
        ({"$or": [{"a": 1}, {"$not": {"b.c": 2}}]}, AnyOf((Equal("a", 1), Not(Equal("b.c", 2))))),
    ],
)
def test_mapping_of_the_client_is_the_filter_of_the_service(given: dict[str, Any], means: Filter) -> None:
    assert repr(read_filter(metadata_filter(given))) == repr(means)


@pytest.mark.parametrize(
    "given",
    [{}, [], "a", {"a": None}, {"a": {}}, {"a": {"$like": "x"}}, {"$nor": []}, {"$or": {"a": 1}}, {"a": [1]}],
)
def test_mapping_that_is_no_filter_is_refused_by_the_client(given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        metadata_filter(given)


@pytest.mark.parametrize("operator", ["$in", "$nin"])
@pytest.mark.parametrize("given", ["1911", b"1911", {"a": 1}, 5, None])
def test_values_that_are_no_list_are_refused_by_field(operator: str, given: Any) -> None:
    """A string was taken for the list of its letters, which nothing matches."""
    with pytest.raises(TypeError, match=rf"year: \{operator} takes a list of values, got "):
        metadata_filter({"year": {operator: given}})
    assert metadata_filter({"year": {operator: {1911}}}) == metadata_filter({"year": {operator: [1911]}})


def test_a_filter_that_no_message_can_hold_is_a_value_error() -> None:
    deep: dict[str, Any] = {"x": 1}
    for _ in range(400):
        deep = {"$not": deep}
    with pytest.raises(ValueError, match="nested too deep"):
        metadata_filter(deep)
