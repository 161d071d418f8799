"""Milvus' indexes on metadata fields: filters on them read the documents that they find, and no others."""

import logging
from collections.abc import Iterable

from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.terms import quoted_path

logger = logging.getLogger(__name__)


def create_filter_indexes(connection: MilvusConnection, collection: str, fields: Iterable[str]) -> list[str]:
    """Has Milvus index the comparable strings of metadata fields, which are all that filters look at.

    A field is a key, or keys joined by dots. Returns the fields that are indexed; a Milvus that has no indexes on
    paths in JSON goes on without, and the log says so. Raises UnavailableError, DiskFullError.
    """
    from pymilvus import MilvusClient  # noqa: PLC0415

    made: list[str] = []
    for field in fields:
        indexes = MilvusClient.prepare_index_params()
        path = quoted_path(field)
        indexes.add_index(
            "terms",
            index_type="INVERTED",
            index_name=f"terms_{field.encode().hex()}",
            params={"json_path": path, "json_cast_type": "varchar"},
        )
        reason = connection.refused("create_index", collection, indexes, sync=False)
        if reason is None:
            made.append(field)
            continue
        logger.warning(
            "this Milvus makes no index for filters on metadata: each new one reads the metadata of all documents",
            extra={"field": field, "collection": collection, "reason": reason},
        )
    return made
