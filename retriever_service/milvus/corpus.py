"""The corpus of a Milvus collection: Milvus holds documents and vectors, a log beside them says what is shown."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rag_serving.errors import AbortedError, CancelledByCallerError, RagError, UnavailableError
from retriever_service.corpus.base import (
    Corpus,
    Delete,
    Deleted,
    Generation,
    Page,
    Progress,
    Upsert,
    Upserted,
)
from retriever_service.errors import EtagError, KeyExistsError, ReadOnlyError, RequestIdReusedError
from retriever_service.milvus.connection import MilvusConnection
from retriever_service.milvus.entities import entity
from retriever_service.milvus.filter_indexes import create_filter_indexes
from retriever_service.milvus.index import MilvusIndex
from retriever_service.milvus.lease import Lease
from retriever_service.milvus.log import ChangeLog, Facts
from retriever_service.milvus.state import Change, Shown, State
from retriever_service.milvus.store import MilvusStore
from retriever_service.work_limit import WorkLimit, current_limit

logger = logging.getLogger(__name__)

_GRACE_S = 60.0  # longer than any search takes from its first call to its last
_MAX_HIDDEN = 4096  # rows that every search is told to leave out
_ROWS_PER_DELETE = 1000
_COMPACTION_POLL_S = 0.2


class MilvusCorpus(Corpus):
    """One collection. What makes a change whole, which Milvus has no transactions for:

    New versions are written to rows behind the last that is shown, where no search looks; then one entity in
    the log, which says what they are and what they replace, makes the change; then searches are shown it. What
    was replaced is left out by every search, and deleted once no search can still be reading it. A change whose
    log entity may or may not have been written is written again, the same, before any other. What is read for a
    request ends with it; what has begun to be written is written to its end.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        log: ChangeLog,
        collection: str,
        facts: Facts,
        *,
        lease: Lease | None,
        read_only_reason: str | None = None,
        requests_kept: int = 100_000,
        grace_s: float = _GRACE_S,
    ) -> None:
        """Opens a collection. `lease` is this process's; None takes no changes, and `read_only_reason` says why.

        Versions that were replaced stay readable for `grace_s`. Raises UnavailableError, DataLossError.
        """
        self.collection = collection
        self.folder = Path(facts.source)
        self._connection = connection
        self._log = log
        self._requests_kept = requests_kept
        self._grace_s = grace_s
        self._facts = facts
        self._lock = threading.RLock()
        self._unsure: tuple[str, Change] | None = None
        self._void: list[tuple[int, int]] = []
        self._closing = contextlib.ExitStack()
        try:
            self._candidate = lease
            self._lease, self._read_only_reason = self._begin_writing(lease, read_only_reason)
            self._closing.callback(self._end_writing)
            connection.ensure_loaded(collection)
            self._shown = Shown(self._read_state())
            # Of each change the state after it and what it hid, until that is deleted.
            self._replaced: deque[tuple[float, State, frozenset[int]]] = deque()
            if self._lease is not None:
                self._inherit()
        except BaseException:
            self._closing.close()
            raise
        manifest = facts.manifest
        self._store = MilvusStore(connection, collection, manifest.dimension, self._shown, facts.etag_prefix)
        self._index = MilvusIndex(
            connection, collection, manifest, self._shown, nprobe=facts.nprobe, ef_search=facts.ef_search
        )
        self._generation = self._make_generation(self._facts.number)

    @property
    def source_id(self) -> str:
        """What the folder that it was made from held."""
        return self._facts.source_id

    @property
    def generation(self) -> Generation:
        """The newest generation."""
        return self._generation

    @property
    def read_only_reason(self) -> str | None:
        """Why changes are refused; None where they are taken."""
        lease = self._lease
        return self._read_only_reason if lease is None else lease.lost_reason

    @property
    def sequence(self) -> int:
        """Number of the last change that searches see."""
        return self._shown.state.sequence

    @property
    def pending_changes(self) -> int:
        """Vectors written or hidden since the last compaction."""
        return self._shown.state.num_changes - self._facts.compacted_changes

    def upsert(self, batch: Upsert) -> Upserted:
        """Writes a batch: see Corpus."""
        manifest = self._generation.manifest
        if (batch.embedding, batch.embeddings.shape[1]) != (manifest.embedding, manifest.dimension):
            raise AbortedError(
                "another index was activated meanwhile: send the batch again", reason="INDEX_CHANGED"
            )
        with self._lock:
            state = self._settled()
            answered = self._answered(batch.request_id, batch.digest)
            if answered is not None:
                return self._upserted(answered)
            current = self._store.rows_of([one.key for one in batch.documents], state)
            for one in batch.documents:
                self._check_etag(one.key, one.etag, current.get(one.key))
                if batch.create_only and one.key in current:
                    raise KeyExistsError(one.key)
            first = max([state.next_row, *(behind for _, behind in self._void)])
            entities = [
                entity(
                    f"documents[{place}]", first + place, one.key, one.title, one.text, one.metadata, vector
                )
                for place, (one, vector) in enumerate(zip(batch.documents, batch.embeddings, strict=True))
            ]
            replaced = [current.get(one.key) for one in batch.documents]
            change = Change(
                revision=state.revision + 1,
                sequence=state.sequence + len(entities),
                num_documents=state.num_documents + replaced.count(None),
                digest=batch.digest,
                first_row=first,
                count=len(entities),
                replaced=replaced,
                void=self._void,
            )
            current_limit().left_s()
            try:
                with (
                    WorkLimit().applied()
                ):  # cut off by a deadline, it would leave rows that are never given again
                    self._connection.upsert(self.collection, entities)
            except RagError:
                # They may be there, or come yet: no later change may have their rows.
                self._void.append((first, first + len(entities)))
                raise
            timestamp = self._connection.last_write
            self._commit(batch.request_id, change.model_copy(update={"timestamp": timestamp}))
        return self._upserted(change)

    def delete(self, batch: Delete) -> Deleted:
        """Deletes a batch: see Corpus."""
        with self._lock:
            state = self._settled()
            change = self._answered(batch.request_id, batch.digest)
            if change is None:
                keys = [key for key, _ in batch.references]
                current = self._store.rows_of(keys, state)
                for key, etag in batch.references:
                    self._check_etag(key, etag, current.get(key))
                hidden = [current[key] for key in keys if key in current]
                change = Change(
                    revision=state.revision + 1,
                    sequence=state.sequence + len(hidden),
                    num_documents=state.num_documents - len(hidden),
                    digest=batch.digest,
                    first_row=state.next_row,
                    replaced=hidden,
                    missing=[place for place, key in enumerate(keys) if key not in current],
                    void=self._void,
                    timestamp=state.timestamp,
                )
                current_limit().left_s()
                if hidden or batch.request_id:
                    self._commit(batch.request_id, change)
        missing_keys = [batch.references[place][0] for place in change.missing]
        return Deleted(len(change.replaced), missing_keys, change.sequence)

    def page(self, after_key: str | None, size: int) -> Page:
        """Returns documents by key: see Corpus."""
        return self._store.page(after_key, size)

    def compact(self, progress: Progress, cancelled: threading.Event) -> Generation:
        """Has Milvus write its segments anew without what was deleted, and counts one more generation.

        The collection stays: the generations of before answer from it too.
        """
        self._check_writer()
        progress("delete", 0, 1)
        self._reap()
        progress("compact", 0, 1)
        job = self._connection.call("compact", self.collection)
        while self._connection.call("get_compaction_state", job) not in {"Completed", "UndefiedState"}:
            if cancelled.wait(_COMPACTION_POLL_S):
                break
        if cancelled.is_set():
            raise CancelledByCallerError("the operation was cancelled")
        with self._lock:
            done = self._settled().num_changes
            self._set_facts(self._facts.model_copy(update={"compacted_changes": done}))
            return self.renumber(self._generation.number + 1)

    def index_filters(self, fields: Sequence[str]) -> None:
        """Has Milvus index metadata fields that are not: see create_filter_indexes."""
        with self._lock:
            missing = [field for field in fields if field not in self._facts.filter_indexes]
            if not missing:
                return
            self._check_writer()
            made = create_filter_indexes(self._connection, self.collection, missing)
            self._set_facts(
                self._facts.model_copy(update={"filter_indexes": [*self._facts.filter_indexes, *made]})
            )

    def renumber(self, number: int) -> Generation:
        """Returns the collection's generation under a new number."""
        with self._lock:
            self._check_writer()
            self._set_facts(self._facts.model_copy(update={"number": number}))
            self._generation = self._make_generation(number)
        return self._generation

    def adopt(self, number: int) -> Generation:
        """Returns the generation under the number that another retriever, which writes, has given it."""
        with self._lock:
            self._generation = self._make_generation(number)
        return self._generation

    def follow(self) -> bool:
        """Shows what another has written, and writes itself once the other has died: see Corpus.

        One that has lost its right to write, as where Milvus lost the sign of it, reads like the others. One that
        writes deletes what no search reads any more.
        """
        for collection in (self.collection, self._log.name):
            self._connection.ensure_loaded(collection)
        with self._lock:
            if self._lease is not None:
                if self._lease.lost_reason is None:
                    self._lease.check()
                    self._settled()
                    self._reap()
                    return False
                self._step_down(self._lease.lost_reason)
            before = self._shown.state.revision
            state = self._read_state()
            self._await(state.timestamp)
            self._shown.state = state
            if self._lease is None and self._candidate is not None:
                self._take_over(self._candidate)
            return self._shown.state.revision != before

    def release(self, generation: Generation) -> None:
        """Nothing is kept for one generation alone."""

    def close(self) -> None:
        """Ends writing; the connection is the caller's."""
        if self._lease is not None:
            with contextlib.suppress(RagError), self._lock:
                self._settled()
        self._closing.close()

    def _begin_writing(self, lease: Lease | None, reason: str | None) -> tuple[Lease | None, str | None]:
        if lease is None:
            return None, reason
        try:
            lease.acquire()
        except ReadOnlyError as error:
            return None, error.message
        return lease, None

    def _end_writing(self) -> None:
        if self._lease is not None:
            self._lease.release()

    def _step_down(self, reason: str) -> None:
        """Reads from now on, until nobody writes: what another may have written is read anew."""
        self._end_writing()
        self._lease, self._read_only_reason = None, reason
        self._unsure = None
        self._replaced.clear()

    def _make_generation(self, number: int) -> Generation:
        manifest = self._facts.manifest.model_copy(update={"generation": number})
        return Generation(number, self._index, self._store, manifest)

    def _read_state(self) -> State:
        self._facts = self._log.facts_of(self.collection) or self._facts
        checkpoint = self._facts.checkpoint
        return State.of(checkpoint, self._log.changes_after(self.collection, checkpoint.revision))

    def _check_writer(self) -> None:
        lease = self._lease
        if lease is None:
            raise ReadOnlyError(f"no changes here: {self._read_only_reason}")
        lease.check()

    def _settled(self) -> State:
        """Returns the state to change, once nothing is unsure: a change that may have been made is made."""
        self._check_writer()
        if self._unsure is not None:
            request_id, change = self._unsure
            self._log.commit(self.collection, request_id, change)
            self._unsure = None
            self._show(change)
        return self._shown.state

    def _commit(self, request_id: str, change: Change) -> None:
        self._check_writer()
        try:
            with WorkLimit().applied():  # cut off, it would be neither made nor not made
                self._log.commit(self.collection, request_id, change)
        except RagError as error:
            self._unsure = (request_id, change)
            raise UnavailableError(
                f"{error.message}; whether the change was made is not known yet: send it again with its request_id",
                reason="MILVUS_UNAVAILABLE",
            ) from error
        self._show(change)

    def _await(self, timestamp: int) -> None:
        """Waits until Milvus' nodes have heard of a timestamp, as each of the searches that need it would else."""
        if timestamp > self._shown.state.timestamp:
            with contextlib.suppress(RagError), WorkLimit().applied():
                self._connection.query(self.collection, "row < 0", ["row"], at=timestamp)

    def _show(self, change: Change) -> None:
        self._await(change.timestamp)
        self._shown.state = self._shown.state.after(change)
        self._void.clear()
        self._replaced.append((time.monotonic(), self._shown.state, frozenset(change.hidden)))

    def _answered(self, request_id: str, digest: str) -> Change | None:
        found = self._log.find(self.collection, request_id) if request_id else None
        if found is not None and found.digest != digest:
            raise RequestIdReusedError(request_id)
        return found

    def _upserted(self, change: Change) -> Upserted:
        rows = list(range(change.first_row, change.first_row + change.count))
        created = change.replaced.count(None)
        etags = [self._store.etag(row) for row in rows]
        return Upserted(rows, etags, created, change.count - created, change.sequence)

    def _check_etag(self, key: str, etag: str, row: int | None) -> None:
        stored = None if row is None else self._store.etag(row)
        if etag and etag != stored:
            raise EtagError(key, etag, stored)

    def _reap(self) -> None:
        """Deletes what was replaced long enough ago, and lets the log begin later."""
        with self._lock:
            now_s = time.monotonic()
            gone: set[int] = set()
            after: State | None = None
            num_hidden = len(self._shown.state.hidden)
            while self._replaced and (
                self._replaced[0][0] + self._grace_s <= now_s or num_hidden - len(gone) > _MAX_HIDDEN
            ):
                _, after, hidden = self._replaced.popleft()
                gone |= hidden
            if after is None:
                return
            self._delete_rows(sorted(gone))
            # Not every Milvus tells when it deleted: it was before what is written now.
            self._set_facts(self._facts)
            timestamp = self._connection.last_write
            self._await(timestamp)
            self._shown.state = self._shown.state.without(frozenset(gone), timestamp)
            self._set_facts(self._facts.model_copy(update={"checkpoint": after.checkpoint(timestamp)}))
            forgotten = min(after.revision, self._shown.state.revision - self._requests_kept)
            if forgotten > 0:
                self._log.forget(self.collection, forgotten)

    def _set_facts(self, facts: Facts) -> None:
        self._log.set_facts(self.collection, facts)
        self._facts = facts

    def _take_over(self, lease: Lease) -> None:
        """Becomes the writer where there is none, unless another collection or generation serves by now."""
        if not self._is_current() or not lease.acquire_if_free():
            return
        # What the last writer did before it ended is seen from here on: nobody else writes any more.
        self._shown.state = self._read_state()
        if not self._is_current():
            lease.release()
            return
        self._lease, self._read_only_reason = lease, None
        self._inherit()
        logger.info("this retriever takes changes now", extra={"collection": self.collection})

    def _is_current(self) -> bool:
        """Whether the alias names this collection, and the generation is the one that its writer served as last."""
        aliases = self._connection.call("list_aliases", self.collection)["aliases"]
        is_active = self.collection.rpartition("_")[0] in aliases
        return is_active and self._facts.number == self._generation.number

    def _inherit(self) -> None:
        """Begins where the writer before ended: what it hid is deleted in time, what it never made is taken away."""
        state = self._shown.state
        self._replaced.append((time.monotonic(), state, state.hidden))
        condition = f"row >= {state.next_row}"
        left = self._connection.query(self.collection, condition, ["row"])
        if left:
            self._delete_rows([int(one["row"]) for one in left])
            self._void.append((state.next_row, max(int(one["row"]) for one in left) + 1))

    def _delete_rows(self, rows: Sequence[int]) -> None:
        for start in range(0, len(rows), _ROWS_PER_DELETE):
            some = list(rows[start : start + _ROWS_PER_DELETE])
            self._connection.call("delete", self.collection, filter=f"row in {some}")
