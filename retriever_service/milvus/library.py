"""The collections of one corpus in Milvus: which serves, and how another comes to."""

import threading
from collections.abc import Sequence
from pathlib import Path

from rag_serving.errors import FailedPreconditionError
from retriever_service.corpus.base import Corpus, CorpusLibrary, Generation, Progress
from retriever_service.errors import MissingIndexError, ReadOnlyError
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import Snapshot
from retriever_service.milvus.connection import MilvusAddress, MilvusConnection
from retriever_service.milvus.corpus import MilvusCorpus
from retriever_service.milvus.importing import discard, import_folder, source_id
from retriever_service.milvus.lease import Lease
from retriever_service.milvus.log import ChangeLog, Facts
from retriever_service.milvus.schema import create_log, log_name, number_of


class MilvusLibrary(CorpusLibrary):
    """The alias names the collection that serves; each index folder that was activated is one of the others.

    A collection is never dropped here once it is whole: it may hold the only copy of what was changed in it.
    """

    def __init__(
        self,
        address: MilvusAddress,
        name: str,
        *,
        lease_s: float,
        take_changes: bool = True,
        requests_kept: int = 100_000,
        filter_indexes: Sequence[str] = (),
    ) -> None:
        """Connects, and makes the log where there is none.

        `lease_s` is how long the sign of a writer that died keeps others from writing. Folders that are opened have
        the metadata fields of `filter_indexes` indexed beside their own. Raises StartupError, UnavailableError.
        """
        self.name = name
        self._take_changes = take_changes
        self._requests_kept = requests_kept
        self._filter_indexes = tuple(filter_indexes)
        self._connection = MilvusConnection(address)
        try:
            if not self._connection.call("has_collection", log_name(name)):
                create_log(self._connection, log_name(name))
            self._connection.ensure_loaded(log_name(name))
        except BaseException:
            self._connection.close()
            raise
        self._log = ChangeLog(self._connection, log_name(name))
        self._lease = Lease(self._log, lease_s)

    @property
    def refused(self) -> str | None:
        """Why nothing can be activated: see CorpusLibrary."""
        return None if self._take_changes else "this retriever was started with --read-only"

    def active(self) -> MilvusCorpus:
        """Opens the collection that the alias names. Raises MissingIndexError, UnavailableError."""
        collection = self._active_name()
        facts = None if collection is None else self._log.facts_of(collection)
        if collection is None or facts is None:
            raise MissingIndexError(
                f"no corpus {self.name!r} in Milvus at {self._connection.address.uri}: import an index folder"
                f" with `rag-index milvus-import FOLDER --collection {self.name}`"
            )
        return self._open(collection, facts)

    def next_number(self) -> int:
        """Returns a generation's number that no collection has had."""
        return max((facts.number for _, facts in self._newest_first()), default=0) + 1

    def manifest(self, folder: Path) -> Manifest:
        """Reads what a folder holds: see CorpusLibrary."""
        return _snapshot(folder).manifest

    def open(
        self,
        folder: Path,
        number: int,
        serving: Sequence[Corpus],
        progress: Progress,
        cancelled: threading.Event,
    ) -> tuple[Corpus, Generation]:
        """Opens the collection that was made from this folder as it is now, or imports it: see CorpusLibrary."""
        snapshot = _snapshot(folder)
        wanted = source_id(snapshot)
        # An activation that was given up has shown its number to followers, who go on to higher ones alone.
        number = max(number, self.next_number())
        for corpus in serving:
            if isinstance(corpus, MilvusCorpus) and corpus.source_id == wanted:
                return corpus, corpus.renumber(number)
        for collection, facts in self._newest_first():
            if facts.is_whole and facts.source_id == wanted:
                opened = self._open(collection, facts)
                try:
                    opened.index_filters(self._filter_indexes)
                    return opened, opened.renumber(number)
                except BaseException:
                    opened.close()
                    raise
        return self._import(snapshot, number, progress, cancelled)

    def newer(self, current: Generation, serving: Sequence[Corpus]) -> tuple[Corpus, Generation] | None:
        """Opens what the one that writes has compacted or activated: see CorpusLibrary."""
        if serving[-1].read_only_reason is None:
            return None
        collection = self._active_name()
        facts = None if collection is None else self._log.facts_of(collection)
        if collection is None or facts is None or facts.number <= current.number:
            return None
        for corpus in serving:
            if isinstance(corpus, MilvusCorpus) and corpus.collection == collection:
                corpus.follow()
                return corpus, corpus.adopt(facts.number)
        opened = self._open(collection, facts)
        return opened, opened.generation

    def remember(self, corpus: Corpus, _generation: Generation) -> None:
        """Points the alias to a collection: see CorpusLibrary."""
        if not isinstance(corpus, MilvusCorpus):
            raise TypeError(f"a corpus of class {type(corpus).__name__} is in no collection")
        if corpus.read_only_reason is not None:
            raise ReadOnlyError(f"no activation here: {corpus.read_only_reason}")
        if self._active_name() is None:
            self._connection.call("create_alias", corpus.collection, self.name)
        else:
            self._connection.call("alter_alias", corpus.collection, self.name)

    def close(self) -> None:
        """Closes the connection: see CorpusLibrary."""
        self._connection.close()

    def _import(
        self, snapshot: Snapshot, number: int, progress: Progress, cancelled: threading.Event
    ) -> tuple[MilvusCorpus, Generation]:
        """Imports a folder while this is the one that writes."""
        self._lease.acquire()
        try:
            numbers = [0]
            for collection, facts in self._newest_first():
                numbers.append(number_of(self.name, collection))
                if not facts.is_whole:
                    discard(self._connection, self._log, collection)
            collection = f"{self.name}_{max(numbers) + 1}"
            facts = import_folder(
                self._connection,
                self._log,
                collection,
                snapshot,
                number,
                progress,
                cancelled,
                self._filter_indexes,
            )
            corpus = self._open(collection, facts)
        finally:
            self._lease.release()
        return corpus, corpus.generation

    def _open(self, collection: str, facts: Facts) -> MilvusCorpus:
        return MilvusCorpus(
            self._connection,
            self._log,
            collection,
            facts,
            lease=self._lease if self._take_changes else None,
            read_only_reason=self.refused,
            requests_kept=self._requests_kept,
        )

    def _active_name(self) -> str | None:
        """Returns the collection that the alias names, None where there is no alias."""
        for collection, _ in self._newest_first():
            named = self._connection.call("list_aliases", collection)
            if self.name in named["aliases"]:
                return collection
        return None

    def _newest_first(self) -> list[tuple[str, Facts]]:
        found = self._log.facts().items()
        return sorted(found, key=lambda one: number_of(self.name, one[0]), reverse=True)


def _snapshot(folder: Path) -> Snapshot:
    try:
        return Snapshot.open(folder)
    except MissingIndexError as error:
        raise FailedPreconditionError(error.message, reason=error.reason) from error
