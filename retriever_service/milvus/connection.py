"""pymilvus with a time limit on every call, and its errors as this service's."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_serving.errors import DataLossError, InternalError, RagError, StartupError, UnavailableError
from retriever_service.errors import DiskFullError
from retriever_service.milvus.channel import MilvusChannel
from retriever_service.work_limit import current_limit

# Codes of Milvus: memory, disk, rate and quota limits; a collection that is gone; a service that is not ready; a
# parameter of ours.
_EXHAUSTED = {3, 7, 8, 9}
_GONE = {100}
_NOT_READY = {1, 2}
_WRONG = {1100}
_RETRY_AFTER_S = 1.0
_ROWS_PER_INSERT = 200  # of 300 KB at most: Milvus takes messages of 64 MB
_GLOBAL_CLUSTER = "global-cluster"  # in the addresses that pymilvus asks another service about first
# ConsistencyLevel's; names would not do beside "iterator".
_STRONG, _CUSTOMIZED = 0, 4


@dataclass(frozen=True, slots=True)
class MilvusAddress:
    """Where Milvus is and how it is asked. `token` is "user:password" or an API key, or empty."""

    uri: str
    token: str = ""
    database: str = ""
    timeout_s: float = 10.0


class MilvusConnection:
    """One connection, used from many threads. A read sees all that was acknowledged before it.

    Milvus has such a read wait until it has heard of the moment at which it was asked, a fifth of a second and more.
    One that says `at` which of Milvus' timestamps it wants to see everything does not, once that has passed.

    What a thread does for requests ends with them (WorkLimit): every method then raises DeadlineExceededError or
    CancelledByCallerError. Every method raises UnavailableError where Milvus does not answer in time, DiskFullError
    where a limit of memory, disk, rate or quota stands in the way, and DataLossError where the collection is gone.
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
        if _GLOBAL_CLUSTER in address.uri.lower():
            raise StartupError(f"{address.uri} stands for several clusters: give the address of one")
        self._channel = MilvusChannel(address.uri)
        try:
            self._client: Any = MilvusClient(
                uri=address.uri,
                token=address.token,
                db_name=address.database,
                timeout=address.timeout_s,
                channel=self._channel,
                dedicated=True,  # pymilvus makes channels of its own for connections that it shares
            )
        except Exception as error:
            raise self._meaning(error) from error
        self.call("list_collections")

    @property
    def last_write(self) -> int:
        """The timestamp at which all that was written here is seen; 0 where Milvus tells none."""
        return self._channel.last_write

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None, **named: Any) -> Any:
        """Calls a method of pymilvus.MilvusClient."""
        try:
            timeout = self.address.timeout_s if timeout_s is None else timeout_s
            if current_limit().left_s() is not None:
                # The caller has the time of its deadline, and is told when to come again.
                named["retry_on_rate_limit"] = False
            return getattr(self._client, method)(*arguments, timeout=timeout, **named)
        except Exception as error:
            raise self._meaning(error, *arguments) from error

    def refused(self, method: str, *arguments: Any, **named: Any) -> str | None:
        """Calls a method with what not every Milvus can do; returns why it refuses, None where it does not."""
        try:
            getattr(self._client, method)(*arguments, timeout=self.address.timeout_s, **named)
        except Exception as error:
            code = getattr(error, "code", None)
            if _own(error) is not None or code in _EXHAUSTED | _GONE | _NOT_READY:
                raise self._meaning(error, *arguments) from error
            return _said(error)
        return None

    def query(
        self, collection: str, expression: str, fields: Sequence[str], *, at: int = 0, **named: Any
    ) -> list[Any]:
        """Returns the entities that meet the expression, in no order, as of a timestamp or later; 0 is now."""
        found = self.call(
            "query",
            collection,
            filter=expression,
            output_fields=list(fields),
            **_seen_at(at),
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

    def search(self, collection: str, vectors: Any, *, at: int = 0, **named: Any) -> list[Any]:
        """Returns the hits of each vector of float32 [batch, dimension], as of a timestamp or later; 0 is now."""
        found = self.call("search", collection, list(vectors), **_seen_at(at), **named)
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

    def _may_be_there(self, collection: str) -> bool:
        """Whether a collection is there that was not found: parts of Milvus may say so for a moment."""
        with contextlib.suppress(Exception):
            return bool(self._client.has_collection(collection, timeout=self.address.timeout_s))
        return True

    def _meaning(self, error: Exception, *arguments: Any) -> Exception:
        """Returns what is raised for an error of a call with these arguments, the collection first."""
        said_here = _own(error)
        if said_here is not None:
            return said_here
        code = getattr(error, "code", None)
        message = f"Milvus at {self.address.uri}: {_said(error)}"
        if code in _EXHAUSTED:
            return DiskFullError(message, retry_after_s=5.0)
        if code in _GONE and not (arguments and self._may_be_there(arguments[0])):
            return DataLossError(message)
        if code in _WRONG:
            return InternalError(message)
        return UnavailableError(message, retry_after_s=_RETRY_AFTER_S, reason="MILVUS_UNAVAILABLE")


def _seen_at(at: int) -> dict[str, int]:
    if at == 0:
        return {"consistency_level": _STRONG}
    return {"consistency_level": _CUSTOMIZED, "guarantee_timestamp": at}


def _own(error: Exception) -> RagError | None:
    """Returns what was raised below pymilvus, which wraps it; its errors may be causes of themselves."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, RagError):
            return cause
        seen.append(cause)
        cause = cause.__cause__
    return None


def _said(error: Exception) -> str:
    return str(getattr(error, "message", "") or error)
