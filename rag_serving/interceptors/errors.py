"""Turns what a handler raises into a status with google.rpc details; unknown faults become INTERNAL."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import grpc

from rag_serving.errors import InternalError, RagError
from rag_serving.interceptors.base import Context, RpcInterceptor
from rag_serving.rich_status import DETAILS_KEY, to_status

logger = logging.getLogger(__name__)


class ErrorInterceptor(RpcInterceptor):
    """Ends an RPC whose handler raised: a RagError with its own status, the rest with INTERNAL and an id.

    The id stands in the log beside the trace, which never leaves the service.
    """

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        """Catches what one RPC raises."""
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except RagError as error:
            level = logging.WARNING if error.status in {"INTERNAL", "DATA_LOSS"} else logging.DEBUG
            logger.log(level, "%s: %s: %s", method, error.status, error.message)
            await _abort(context, error)
        except Exception as error:
            error_id = uuid.uuid4().hex
            logger.exception("%s failed", method, extra={"error_id": error_id})
            hidden = InternalError(
                f"the service failed; its log tells more under error id {error_id}",
                metadata={"error_id": error_id},
            )
            hidden.__cause__ = error
            await _abort(context, hidden)


async def _abort(context: Context, error: RagError) -> NoReturn:
    status = to_status(error)
    await context.abort(
        grpc.StatusCode[error.status],
        status.message,
        # Given here it replaces what was set before, the request id among it.
        trailing_metadata=(
            *(context.trailing_metadata() or ()),
            (DETAILS_KEY, status.SerializeToString()),
        ),
    )
