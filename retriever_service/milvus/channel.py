"""The channel that pymilvus calls through: a call ends with the requests that it is made for."""

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

import grpc

from rag_serving.errors import DeadlineExceededError, UnavailableError
from retriever_service.work_limit import WorkLimit, current_limit

_RETRY_AFTER_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_FASTEST_KEEPALIVE_MS = 300_000
# Where pymilvus makes the channel, it pings every 10 s, in idle hours too, and servers with gRPC's own limits hang up
# on that. What keepalive is for here is that a write into a lost connection is noticed within its timeout.
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", _FASTEST_KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class MilvusChannel(grpc.Channel):
    """What one call of pymilvus may take is bounded here, since pymilvus would not keep to it.

    It tries again for as long as its timeout once more, after pauses of seconds, on a channel that it makes anew.
    Here a call waits for the connection, and is tried again where it was lost, until its own timeout or the deadline
    of the requests it is made for, whichever comes first; once all of those were cancelled it is cancelled too.
    Then it raises UnavailableError, DeadlineExceededError or CancelledByCallerError, which pymilvus does not retry.
    """

    def __init__(self, uri: str) -> None:
        """Makes a channel to http://host[:19530] or https://host[:443]; it connects by itself."""
        self._last_write = 0
        self._last_write_lock = threading.Lock()
        parts = urlsplit(uri)
        is_secure = parts.scheme == "https"
        target = f"{parts.hostname}:{parts.port or (443 if is_secure else 19530)}"
        self._uri = uri
        if is_secure:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)

    @property
    def last_write(self) -> int:
        """Milvus' timestamp of the last write that was answered here; 0 before, or of a Milvus that tells none."""
        return self._last_write

    def unary_unary(self, *arguments: Any, **named: Any) -> "_UnaryCall":
        """Returns what calls a method: see grpc.Channel."""
        return _UnaryCall(self._channel.unary_unary(*arguments, **named), self._uri, self._answered)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.Channel's; nothing here uses it."""
        return self._channel.unary_stream(*arguments, **named)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.Channel's; nothing here uses it."""
        return self._channel.stream_unary(*arguments, **named)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.Channel's; nothing here uses it."""
        return self._channel.stream_stream(*arguments, **named)

    def subscribe(self, callback: Callable[[Any], None], try_to_connect: bool | None = False) -> None:
        """As grpc.Channel's."""
        self._channel.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Callable[[Any], None]) -> None:
        """As grpc.Channel's."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def _answered(self, answer: Any) -> None:
        if answer.DESCRIPTOR.name == "MutationResult":
            with self._last_write_lock:
                self._last_write = max(self._last_write, answer.timestamp)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _UnaryCall(grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]  # generic in its stubs alone
    def __init__(self, call: Any, uri: str, answered: Callable[[Any], None]) -> None:
        self._call = call
        self._uri = uri
        self._answered = answered

    def __call__(self, request: Any, timeout: float | None = None, *_: Any, **named: Any) -> Any:
        return self.with_call(request, timeout, **named)[0]

    def with_call(self, request: Any, timeout: float | None = None, *_: Any, **named: Any) -> Any:
        """Calls, within the limit of the work that this thread does."""
        limit = current_limit()
        until_s = None if timeout is None else time.monotonic() + timeout
        pause_s = _FIRST_PAUSE_S
        lost: grpc.RpcError | None = None
        while True:
            try:
                return self._once(request, until_s, limit, named)
            except grpc.RpcError as error:
                limit.left_s()  # raises where the request has ended meanwhile
                code = error.code()
                if code is grpc.StatusCode.UNIMPLEMENTED:  # pymilvus goes another way then
                    raise
                if code is grpc.StatusCode.UNAVAILABLE:
                    lost = error
                    left_s = math.inf if until_s is None else until_s - time.monotonic()
                    if left_s > 0:
                        _pause(min(pause_s, left_s), limit)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                        continue
                said = error if lost is None else lost
                raise UnavailableError(
                    f"Milvus at {self._uri}: {said.code().name}: {said.details()}",
                    retry_after_s=_RETRY_AFTER_S,
                    reason="MILVUS_UNAVAILABLE",
                ) from error

    def future(self, request: Any, timeout: float | None = None, *_: Any, **named: Any) -> Any:
        """Calls and returns the future of the answer that is there: pymilvus waits for it at once in any case."""
        return self.with_call(request, timeout, **named)[1]

    def _once(self, request: Any, until_s: float | None, limit: WorkLimit, named: dict[str, Any]) -> Any:
        left_s = limit.left_s()
        own_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        is_requests = left_s is not None and (own_s is None or left_s <= own_s)
        call = self._call.future(
            request, left_s if is_requests else own_s, **{**named, "wait_for_ready": True}
        )
        with limit.interrupted_by(call.cancel):
            try:
                answer = call.result()
            except grpc.FutureCancelledError as error:
                limit.left_s()
                raise UnavailableError(f"Milvus at {self._uri}: the connection was closed") from error
            except grpc.RpcError as error:
                if is_requests and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise DeadlineExceededError(
                        f"Milvus at {self._uri} had not answered when the request's deadline passed"
                    ) from error
                raise
        self._answered(answer)
        return answer, call


def _pause(pause_s: float, limit: WorkLimit) -> None:
    left_s = limit.left_s()
    woken = threading.Event()
    with limit.interrupted_by(woken.set):
        woken.wait(pause_s if left_s is None else min(pause_s, left_s))
