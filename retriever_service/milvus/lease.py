"""The one retriever that writes a corpus: a sign in the log, renewed while it lives."""

import contextlib
import logging
import threading
import time
import uuid
from typing import Any

from rag_serving.errors import RagError, UnavailableError
from retriever_service.errors import ReadOnlyError
from retriever_service.milvus.log import ChangeLog

logger = logging.getLogger(__name__)

_RENEWALS = 4  # signs in the time of a lease


class Lease:
    """Milvus cannot compare and set: two that start at one moment may both believe that they write, until a renewal.

    A sign that does not change for the time of a lease is that of a dead one. No clocks are compared.
    """

    def __init__(self, log: ChangeLog, duration_s: float) -> None:
        self._log = log
        self._duration_s = duration_s
        self._holder = uuid.uuid4().hex
        self._beat = 0
        self._valid_until_s = 0.0
        self._lost_to: str | None = None
        self._holders = 0
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._renewing: threading.Thread | None = None
        self._seen: dict[str, Any] | None = None
        self._seen_since_s = 0.0

    def acquire(self) -> None:
        """Becomes the writer, or counts one more user of this lease.

        Waits for the time of a lease where one that writes has died. Raises ReadOnlyError where one lives, and
        UnavailableError.
        """
        with self._guard:
            if not self._holders:
                self._take()
            self._holders += 1

    def acquire_if_free(self) -> bool:
        """Becomes the writer where none has lived for the time of a lease, as far as this was asked again and again.

        Raises UnavailableError.
        """
        with self._guard:
            if self._lost_to is not None and self._holders:
                return False
            if not self._holders:
                if not self._is_free():
                    return False
                try:
                    self._begin()
                except ReadOnlyError:
                    return False
            self._holders += 1
            return True

    def release(self) -> None:
        """Ends it, so that another can write at once, when its last user has."""
        with self._guard:
            self._holders -= 1
            if self._holders:
                return
        self._stopped.set()
        if self._renewing is not None:
            self._renewing.join()
        with contextlib.suppress(RagError):
            if self._lost_to is None:
                self._log.clear_owner()

    @property
    def lost_reason(self) -> str | None:
        """Why changes are refused for good; None while this is the writer."""
        return None if self._lost_to is None else f"another retriever ({self._lost_to}) writes to it now"

    def check(self) -> None:
        """Raises ReadOnlyError where another writes now, and UnavailableError while nobody can tell."""
        if self.lost_reason is not None:
            raise ReadOnlyError(f"no changes here: {self.lost_reason}")
        if time.monotonic() >= self._valid_until_s:
            raise UnavailableError(
                "this retriever could not renew its right to write: Milvus does not answer",
                reason="MILVUS_UNAVAILABLE",
            )

    def _take(self) -> None:
        while not self._is_free():
            time.sleep(self._duration_s / (2 * _RENEWALS))
            seen, now = self._seen, self._log.owner()
            if now is not None and now != seen:
                raise ReadOnlyError(f"another retriever ({now['holder']}) writes to it: send changes to it")
        self._begin()

    def _is_free(self) -> bool:
        """Whether there is no sign, or one that has stayed the same since it was first looked at long enough ago."""
        now = self._log.owner()
        if now is None:
            return True
        if now != self._seen:
            self._seen, self._seen_since_s = now, time.monotonic()
            return False
        return time.monotonic() - self._seen_since_s >= self._duration_s

    def _begin(self) -> None:
        self._lost_to = None
        self._sign()
        # Another that started at the same moment has written by now; the last sign stands.
        time.sleep(self._duration_s / 100)
        if not self._is_ours():
            raise ReadOnlyError(f"another retriever ({self._lost_to}) has just begun to write to it")
        self._stopped.clear()
        self._renewing = threading.Thread(target=self._renew, name="milvus lease", daemon=True)
        self._renewing.start()

    def _sign(self) -> None:
        began_s = time.monotonic()
        self._beat += 1
        self._log.set_owner({"holder": self._holder, "beat": self._beat})
        self._valid_until_s = began_s + self._duration_s

    def _is_ours(self) -> bool:
        owner = self._log.owner()
        if owner is not None and owner["holder"] == self._holder:
            return True
        self._lost_to = "unknown" if owner is None else str(owner["holder"])
        return False

    def _renew(self) -> None:
        while not self._stopped.wait(self._duration_s / _RENEWALS):
            try:
                if not self._is_ours():
                    logger.error("another retriever writes this corpus", extra={"holder": self._lost_to})
                    return
                self._sign()
            except RagError as error:
                logger.warning("cannot renew the right to write: %s", error.message)
