"""A retriever in the test's own process, without its gRPC server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rag_serving.metrics import Metrics
from retriever_service.config import RetrieverSettings
from retriever_service.main import Serving, load, make_serving
from retriever_service.metrics import RetrieverMetrics


@asynccontextmanager
async def in_process(folder: Path, checkpoint: Path, **settings: Any) -> AsyncIterator[Serving]:
    """Serves an index folder with these settings."""
    given = {"index_folder": folder, "generator_checkpoint": str(checkpoint)}
    checked = RetrieverSettings.model_validate(given | settings)
    metrics = RetrieverMetrics(Metrics("retriever"))
    serving = make_serving(load(checked, metrics), checked, metrics)
    try:
        yield serving
    finally:
        await serving.close()
