"""pymilvus with a time limit on every call, and its errors as this service's."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_serving.errors import DataLossError, InternalError, StartupError, UnavailableError
from retriever_service.errors import DiskFullError

# Codes of Milvus: memory, disk, rate and quota limits; a collection that is gone; a parameter of ours.
_EXHAUSTED = {3, 7, 8, 9}
_GONE = {100}
_WRONG = {1100}
_RETRY_AFTER_S = 1.0
_ROWS_PER_INSERT = 200  # of 300 KB at most: Milvus takes messages of 64 MB
# pymilvus pings every 10 s, in idle hours too; servers with gRPC's own limits hang up on that. Calls have a time limit.
_CHANNEL_OPTIONS = {"grpc.keepalive_time_ms": 300_000, "grpc.keepalive_permit_without_calls": False}
_STRONG = 0  # ConsistencyLevel.Strong; a name would not do beside "iterator"


@dataclass(frozen=True, slots=True)
class MilvusAddress:
    """Where Milvus is and how it is asked. `token` is "user:password" or an API key, or empty."""

    uri: str
    token: str = ""
    database: str = ""
    timeout_s: float = 10.0


class MilvusConnection:
    """One connection, used from many threads. Every read is strongly consistent: it sees all that was acknowledged.

    Every method raises UnavailableError where Milvus does not answer in time, DiskFullError where a limit of
    memory, disk, rate or quota stands in the way, and DataLossError where the collection is gone.
    """

    def __init__(self, address: MilvusAddress) -> None:
        """Connects. Raises StartupError where pymilvus is not installed, or UnavailableError."""
        try:
            from pymilvus import MilvusClient  # noqa: PLC0415  (an extra: a retriever without Milvus starts)
        except ImportError as error:
            raise StartupError(
                "--backend milvus needs pymilvus: install ragpair with its extra milvus, ragpair[milvus]"
            ) from error
        # Every failure is raised here too, and says less at greater length there.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        self.address = address
        try:
            self._client: Any = MilvusClient(
                uri=address.uri,
                token=address.token,
                db_name=address.database,
                timeout=address.timeout_s,
                grpc_options=_CHANNEL_OPTIONS,
            )
        except Exception as error:
            raise self._meaning(error) from error
        self.call("list_collections")

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None, **named: Any) -> Any:
        """Calls a method of pymilvus.MilvusClient."""
        try:
            timeout = self.address.timeout_s if timeout_s is None else timeout_s
            return getattr(self._client, method)(*arguments, timeout=timeout, **named)
        except Exception as error:
            raise self._meaning(error) from error

    def query(self, collection: str, expression: str, fields: Sequence[str], **named: Any) -> list[Any]:
        """Returns the entities that meet the expression, in no order."""
        found = self.call(
            "query",
            collection,
            filter=expression,
            output_fields=list(fields),
            consistency_level=_STRONG,
            **named,
        )
        return list(found)

    def first(self, collection: str, expression: str, fields: Sequence[str], limit: int) -> list[Any]:
        """Returns up to `limit` entities that meet the expression, the first by primary key, in its order.

        Fewer than `limit` do not say that there are no others.
        """
        # What pymilvus' own iterator asks with: without it a limit gives any entities, in any order.
        return self.query(
            collection, expression, fields, limit=limit, iterator="True", reduce_stop_for_best=True
        )

    def search(self, collection: str, vectors: Any, **named: Any) -> list[Any]:
        """Returns the hits of each vector of float32 [batch, dimension]."""
        found = self.call("search", collection, list(vectors), consistency_level=_STRONG, **named)
        return list(found)

    def upsert(self, collection: str, entities: Sequence[dict[str, Any]]) -> None:
        """Writes entities, in messages of bounded size; one that is written twice, as a retry may, is there once."""
        for start in range(0, len(entities), _ROWS_PER_INSERT):
            self.call("upsert", collection, list(entities[start : start + _ROWS_PER_INSERT]))

    def ensure_loaded(self, collection: str) -> None:
        """Has Milvus load a collection that is not: it answers from no other."""
        state = self.call("get_load_state", collection)["state"]
        if getattr(state, "name", "") != "Loaded":
            self.call("load_collection", collection)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def _meaning(self, error: Exception) -> Exception:
        code = getattr(error, "code", None)
        said = getattr(error, "message", "") or str(error)
        message = f"Milvus at {self.address.uri}: {said}"
        if code in _EXHAUSTED:
            return DiskFullError(message, retry_after_s=5.0)
        if code in _GONE:
            return DataLossError(message)
        if code in _WRONG:
            return InternalError(message)
        return UnavailableError(message, retry_after_s=_RETRY_AFTER_S, reason="MILVUS_UNAVAILABLE")
