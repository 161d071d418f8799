"""Gives each RPC an id that its log lines carry and its caller gets back."""

import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rag_serving.interceptors.base import Context, RpcInterceptor
from rag_serving.logging import request_id

HEADER = "x-request-id"
_ACCEPTED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIdInterceptor(RpcInterceptor):
    """Takes the caller's x-request-id, or makes one where it is missing or unfit for a log."""

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        """Sets the id for one RPC and returns it in the trailing metadata."""
        given = next((value for key, value in context.invocation_metadata() or () if key == HEADER), "")
        current = given if isinstance(given, str) and _ACCEPTED.fullmatch(given) else _made()
        request_id.set(current)
        context.set_trailing_metadata(((HEADER, current),))
        yield


def _made() -> str:
    """A new id. No secret, and so not asked of the system, which costs a wait for the interpreter's lock."""
    return f"{random.getrandbits(128):032x}"
