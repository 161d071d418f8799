"""NAME_log: the changes of every collection of a corpus, and what each collection is."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from retriever_service.index.manifest import Manifest
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.state import Change, Checkpoint

_CHANGE, _FACTS, _OWNER = "change", "facts", "owner"
_PER_QUERY = 1000


class Facts(BaseModel):
    """What a collection is. `source` is the index folder, `source_id` what it held; `is_whole` once all of it is in.

    `number` is the generation that it served as last, `compacted_changes` the changes before its last compaction,
    `filter_indexes` the metadata fields that Milvus has indexed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Manifest
    source: str
    source_id: str
    number: int
    etag_prefix: str
    nprobe: int
    ef_search: int
    checkpoint: Checkpoint
    compacted_changes: int = 0
    filter_indexes: Sequence[str] = ()
    is_whole: bool


class ChangeLog:
    """One corpus's log. Each write is one entity, which Milvus writes whole or not at all."""

    def __init__(self, connection: MilvusConnection, name: str) -> None:
        """Takes the name of the collection, which is there."""
        self._connection = connection
        self.name = name

    def facts(self) -> dict[str, Facts]:
        """Returns the facts of each collection."""
        found = self._connection.query(self.name, f'kind == "{_FACTS}"', ["scope", "body"])
        return {one["scope"]: Facts.model_validate_json(one["body"]) for one in found}

    def facts_of(self, collection: str) -> Facts | None:
        """Returns the facts of a collection, None where there are none."""
        found = self._connection.query(self.name, f'id == "{collection}/{_FACTS}"', ["body"])
        return Facts.model_validate_json(found[0]["body"]) if found else None

    def set_facts(self, collection: str, facts: Facts) -> None:
        """Writes the facts of a collection."""
        self._write(f"{collection}/{_FACTS}", collection, _FACTS, facts.model_dump_json())

    def clear_facts(self, collection: str) -> None:
        """Takes the facts of a collection away."""
        self._connection.call("delete", self.name, ids=[f"{collection}/{_FACTS}"])

    def changes_after(self, collection: str, revision: int) -> list[Change]:
        """Returns the changes behind that revision, in their order."""
        changes: list[Change] = []
        while True:
            last = changes[-1].revision if changes else revision
            expression = (
                f'scope == "{collection}" and kind == "{_CHANGE}" and id > "{_change_id(collection, last)}"'
            )
            found = self._connection.first(self.name, expression, ["id", "body"], _PER_QUERY)
            if not found:
                return changes
            changes += [Change.model_validate_json(one["body"]) for one in found]

    def find(self, collection: str, request_id: str) -> Change | None:
        """Returns the change that was made under a request_id."""
        request = _hashed(request_id)
        expression = f'scope == "{collection}" and request == "{request}"'
        # Whoever looks here writes, and has signed for it after all that others had written.
        found = self._connection.query(self.name, expression, ["body"], at=self._connection.last_write)
        return Change.model_validate_json(found[0]["body"]) if found else None

    def commit(self, collection: str, request_id: str, change: Change) -> None:
        """Makes a change. Doing it again is harmless."""
        self._write(
            _change_id(collection, change.revision),
            collection,
            _CHANGE,
            change.model_dump_json(),
            number=change.revision,
            request=_hashed(request_id) if request_id else "",
        )

    def forget(self, collection: str, up_to: int) -> None:
        """Forgets the changes up to a revision."""
        expression = f'scope == "{collection}" and kind == "{_CHANGE}" and number <= {up_to}'
        self._connection.call("delete", self.name, filter=expression)

    def owner(self) -> dict[str, Any] | None:
        """Returns what the one that writes left here, if there is one."""
        found = self._connection.query(self.name, f'id == "{_OWNER}"', ["body"])
        return None if not found else dict(json.loads(found[0]["body"]))

    def set_owner(self, owner: dict[str, Any]) -> None:
        """Leaves a sign of the one that writes."""
        self._write(_OWNER, _OWNER, _OWNER, json.dumps(owner))

    def clear_owner(self) -> None:
        """Takes the sign away."""
        self._connection.call("delete", self.name, ids=[_OWNER])

    def _write(
        self, identity: str, scope: str, kind: str, body: str, *, number: int = 0, request: str = ""
    ) -> None:
        entity = {
            "id": identity,
            "scope": scope,
            "kind": kind,
            "number": number,
            "request": request,
            "body": body,
            "vector": [0.0, 0.0],
        }
        self._connection.upsert(self.name, [entity])


def _change_id(collection: str, revision: int) -> str:
    return f"{collection}/{_CHANGE}/{revision:016x}"


def _hashed(request_id: str) -> str:
    return hashlib.sha256(request_id.encode()).hexdigest()
