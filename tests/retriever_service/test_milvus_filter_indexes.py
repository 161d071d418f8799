"""Indexes for filters on metadata in Milvus: those of the folder, where Milvus can make them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pymilvus.grpc_gen import common_pb2

from rag_serving.errors import UnavailableError
from retriever_service.errors import DiskFullError
from retriever_service.filters import Equal
from retriever_service.milvus import corpus as corpus_module
from retriever_service.milvus import importing
from retriever_service.milvus.filter_indexes import create_filter_indexes
from retriever_service.milvus.terms import expression
from tests.retriever_service.fake_milvus import connected
from tests.retriever_service.milvus_server import MilvusServer, import_folder, library
from tests.retriever_service.test_corpus import DOCUMENTS
from tests.retriever_service.tiny_models import write_jsonl

FIELDS = ["year", "source.name", "wäre gut"]


def test_each_field_has_an_index_on_the_path_that_filters_read() -> None:
    with connected() as (fake, connection):
        assert create_filter_indexes(connection, "c_1", FIELDS) == FIELDS
        assert {(one.collection_name, one.field_name) for one in fake.indexes} == {("c_1", "terms")}
        assert len({one.index_name for one in fake.indexes}) == len(FIELDS)
        for one, field in zip(fake.indexes, FIELDS, strict=True):
            given = {pair.key: pair.value for pair in one.extra_params}
            given |= json.loads(given.pop("params", "{}"))
            assert (given["index_type"], given["json_cast_type"]) == ("INVERTED", "varchar")
            assert f"(exists {given['json_path']})" in expression(Equal(field, 1990))


def test_a_milvus_without_such_indexes_goes_on_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with connected() as (fake, connection):
        fake.takes_index = common_pb2.Status(code=1100, reason="INVERTED are not supported on JSON field")
        with caplog.at_level(logging.WARNING):
            assert create_filter_indexes(connection, "c_1", ["year"]) == []
        assert caplog.records[0].__dict__["field"] == "year"
        assert "not supported on JSON" in caplog.records[0].__dict__["reason"]
        for code, kind in ((2, UnavailableError), (7, DiskFullError)):
            fake.takes_index = common_pb2.Status(code=code, reason="said")
            with pytest.raises(kind, match="said"):
                create_filter_indexes(connection, "c_1", ["year"])


def test_a_folder_brings_its_fields_and_an_import_can_add_some(
    milvus: MilvusServer,
    tmp_path: Path,
    build_corpus: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """milvus-lite refuses them, so that what it is asked for is noted; that it refuses harms no import."""
    folder = tmp_path / "index"
    build_corpus(
        write_jsonl(tmp_path / "c.jsonl", DOCUMENTS[:9]), folder, filter_indexes=("year", "language")
    )
    asked: list[list[str]] = []

    def create(_connection: Any, _collection: str, fields: Any) -> list[str]:
        asked.append(list(fields))
        assert create_filter_indexes(_connection, _collection, fields) == [], "milvus-lite has them now"
        return [field for field in fields if field != "source"]

    monkeypatch.setattr(importing, "create_filter_indexes", create)
    monkeypatch.setattr(corpus_module, "create_filter_indexes", create)
    import_folder(milvus.uri, "indexed", folder, filter_indexes=("source",))
    assert asked == [["language", "source", "year"]]
    import_folder(milvus.uri, "indexed", folder, number=2, filter_indexes=("year", "source", "author"))
    assert asked[1:] == [["source", "author"]], "what was refused is tried again, what is there is not"
    with library(milvus.uri, "indexed") as shelf:
        corpus = shelf.active()
        assert corpus._facts.filter_indexes == ["language", "year", "author"]
        assert corpus.generation.index.ntotal == 9
        corpus.close()
