"""The corpus and the library that the settings name."""

import functools
import logging
from pathlib import Path

from rag_serving.errors import StartupError
from retriever_service.config import Backend, RetrieverSettings
from retriever_service.corpus.active import active_version, read_active
from retriever_service.corpus.base import Corpus, CorpusLibrary
from retriever_service.corpus.local import LocalCorpus
from retriever_service.corpus.local_library import LocalLibrary
from retriever_service.index.base import VectorIndex
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.index.fallback import IndexFallback, SearchFallback
from retriever_service.index.gpu.copy import GpuOptions
from retriever_service.index.gpu.pool import GpuPool
from retriever_service.metrics import RetrieverMetrics
from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary

logger = logging.getLogger(__name__)


def open_backend(settings: RetrieverSettings, metrics: RetrieverMetrics) -> tuple[CorpusLibrary, Corpus]:
    """Opens what is active. Raises a RagError that says what is missing, damaged or out of reach."""
    if settings.backend is Backend.MILVUS:
        return _open_milvus(settings)
    home = settings.index_folder
    if home is None:
        raise StartupError("--index-folder is required with --backend local")
    followed = active_version(home)
    active = read_active(home)
    gpus = _open_gpus(settings, metrics)
    open_folder = functools.partial(_open_folder, settings, gpus)
    try:
        corpus = open_folder(*active)
    except BaseException:
        if gpus is not None:
            gpus.close()
        raise
    refused = corpus.read_only_reason
    if refused is not None:
        # It may follow to a folder whose writer has gone for a moment, and must not take its place.
        open_folder = functools.partial(_open_folder, settings.model_copy(update={"read_only": True}), gpus)
    return LocalLibrary(home, open_folder, refused=refused, followed=followed, gpus=gpus), corpus


def activation_root(settings: RetrieverSettings) -> Path | None:
    """Returns the folder below which index folders can be activated, None where none can."""
    if settings.activation_root is not None or settings.index_folder is None:
        return settings.activation_root
    return settings.index_folder.absolute().parent


def _open_milvus(settings: RetrieverSettings) -> tuple[CorpusLibrary, Corpus]:
    address = MilvusAddress(
        settings.milvus_uri,
        settings.milvus_token.get_secret_value(),
        settings.milvus_database,
        settings.milvus_timeout_s,
    )
    library = MilvusLibrary(
        address,
        settings.milvus_collection,
        lease_s=settings.milvus_lease_s,
        take_changes=not settings.read_only,
        requests_kept=settings.request_ids_kept,
    )
    try:
        return library, library.active()
    except BaseException:
        library.close()
        raise


def _open_gpus(settings: RetrieverSettings, metrics: RetrieverMetrics) -> GpuPool | None:
    """Takes the GPUs that indexes are put on; None where there are none to take, and the log says why."""
    if not settings.index_devices:
        return None
    if settings.memory_map:
        logger.warning(
            "indexes stay on the CPU: --memory-map reads pages as they are used, a GPU needs them all"
        )
        return None
    options = GpuOptions(
        sharding=settings.index_gpu_sharding,
        float16=settings.index_gpu_float16,
        cagra=settings.index_gpu_cagra,
    )
    mib = settings.index_gpu_temp_memory_mib

    def fell_back(reason: SearchFallback) -> None:
        metrics.search_fallbacks_total.labels(reason.value).inc()

    return GpuPool.open(
        settings.index_devices,
        options,
        temp_memory_bytes=None if mib is None else mib << 20,
        fell_back=fell_back,
    )


def _open_folder(
    settings: RetrieverSettings, gpus: GpuPool | None, folder: Path, number_offset: int
) -> LocalCorpus:
    def load_index(file: Path) -> VectorIndex:
        index = FaissIndex.load(file, memory_map=settings.memory_map)
        if gpus is not None:
            return gpus.place(index)
        if settings.index_devices:
            index.fallback = IndexFallback.MEMORY_MAP if settings.memory_map else IndexFallback.NO_GPU
        return index

    return LocalCorpus(
        folder,
        load_index=load_index,
        verify=settings.verify,
        number_offset=number_offset,
        generations_kept=settings.generations_kept,
        requests_kept=settings.request_ids_kept,
        take_changes=not settings.read_only,
    )
