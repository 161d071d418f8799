"""What a corpus is in Milvus: its collections, their fields and indexes.

A corpus NAME is an alias of the collection that serves, one of NAME_1, NAME_2, …, each made from an index folder.
NAME_log holds what Milvus has no transactions for: the changes, what each collection is, who writes.
"""

import re
from collections.abc import Sequence
from typing import Any

from retriever_service.errors import CompactionError
from retriever_service.index.manifest import Manifest
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.types import Metric

MAX_VARCHAR_BYTES = 65_535
MAX_JSON_BYTES = 65_536
MAX_KEY_BYTES = 1024

_METRICS = {Metric.INNER_PRODUCT: "IP", Metric.L2: "L2"}
_HNSW = re.compile(r"HNSW(\d+)(?:,Flat)?")
_IVF = re.compile(r"IVF(\d+),(Flat|SQ8|PQ(\d+)(?:x(\d+))?)")


def log_name(corpus: str) -> str:
    """Returns the name of the collection beside a corpus's own."""
    return f"{corpus}_log"


def number_of(corpus: str, collection: str) -> int:
    """Returns n of NAME_n, or 0 for a collection that is none of the corpus's."""
    found = re.fullmatch(rf"{re.escape(corpus)}_(\d+)", collection)
    return int(found[1]) if found else 0


def primary_key(key: str, row: int) -> str:
    """Returns a version's primary key: in the order of keys, then of rows.

    Hexadecimal keeps the order of keys and needs no quoting; "." stands before every digit.
    """
    return f"{key.encode().hex()}.{row:016x}"


def behind(key: str) -> str:
    """Returns what stands behind every version of a key, and before every other key behind it."""
    return f"{key.encode().hex()}/"


def index_parameters(kind: str) -> tuple[str, dict[str, int]]:
    """Returns Milvus' index type and its parameters for a faiss factory string.

    Raises CompactionError where Milvus has no such kind.
    """
    if kind == "Flat":
        return "FLAT", {}
    hnsw, ivf = _HNSW.fullmatch(kind), _IVF.fullmatch(kind)
    if hnsw:
        # faiss builds with efConstruction 40 unless told otherwise; a cluster can afford more.
        return "HNSW", {"M": int(hnsw[1]), "efConstruction": 200}
    if ivf is None:
        raise CompactionError(
            f"an index of kind {kind!r} cannot be imported: Milvus has Flat, HNSWm, IVFn,Flat, IVFn,SQ8 and"
            " IVFn,PQm"
        )
    lists = {"nlist": int(ivf[1])}
    if ivf[3]:
        return "IVF_PQ", {**lists, "m": int(ivf[3]), "nbits": int(ivf[4] or 8)}
    return ("IVF_FLAT" if ivf[2] == "Flat" else "IVF_SQ8"), lists


def create_documents(connection: MilvusConnection, collection: str, manifest: Manifest) -> None:
    """Makes the collection of a corpus's documents, loaded. Raises CompactionError for a kind that Milvus lacks."""
    from pymilvus import DataType, MilvusClient  # noqa: PLC0415

    index_type, parameters = index_parameters(manifest.kind)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=2 * MAX_KEY_BYTES + 17)
    schema.add_field("row", DataType.INT64)
    schema.add_field("key", DataType.VARCHAR, max_length=2 * MAX_KEY_BYTES)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=manifest.dimension)
    schema.add_field("title", DataType.VARCHAR, max_length=MAX_VARCHAR_BYTES)
    schema.add_field("text", DataType.VARCHAR, max_length=MAX_VARCHAR_BYTES)
    schema.add_field("metadata", DataType.VARCHAR, max_length=MAX_VARCHAR_BYTES)
    schema.add_field("terms", DataType.JSON)
    indexes = MilvusClient.prepare_index_params()
    metric = _METRICS[manifest.metric]
    indexes.add_index("embedding", index_type=index_type, metric_type=metric, params=parameters)
    _create(connection, collection, schema, indexes, ("row", "key"))


def create_log(connection: MilvusConnection, collection: str) -> None:
    """Makes the collection of changes and facts, loaded."""
    from pymilvus import DataType, MilvusClient  # noqa: PLC0415

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=512)
    schema.add_field("scope", DataType.VARCHAR, max_length=256)
    schema.add_field("kind", DataType.VARCHAR, max_length=16)
    schema.add_field("number", DataType.INT64)
    schema.add_field("request", DataType.VARCHAR, max_length=64)
    schema.add_field("body", DataType.VARCHAR, max_length=MAX_VARCHAR_BYTES)
    # Milvus takes no collection without a vector.
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    indexes = MilvusClient.prepare_index_params()
    indexes.add_index("vector", index_type="FLAT", metric_type="L2")
    _create(connection, collection, schema, indexes, ("scope", "request"))


def _create(
    connection: MilvusConnection, collection: str, schema: Any, indexes: Any, scalars: Sequence[str]
) -> None:
    from pymilvus import MilvusClient  # noqa: PLC0415

    connection.call("create_collection", collection, schema=schema, consistency_level="Strong")
    # An empty collection's indexes need no waiting for, which pymilvus would do half a second at a time.
    connection.call("create_index", collection, indexes, sync=False)
    for field in scalars:
        for index_type in ("INVERTED", ""):  # the kind that Milvus chooses where it has no such (before 2.4)
            own = MilvusClient.prepare_index_params()
            own.add_index(field, index_type=index_type)
            if connection.refused("create_index", collection, own, sync=False) is None:
                break
    connection.call("load_collection", collection)
