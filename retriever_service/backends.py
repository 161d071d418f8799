"""The corpus and the library that the settings name."""

import functools
from pathlib import Path

from rag_serving.errors import StartupError
from retriever_service.config import Backend, RetrieverSettings
from retriever_service.corpus.active import read_active
from retriever_service.corpus.base import Corpus, CorpusLibrary
from retriever_service.corpus.local import LocalCorpus
from retriever_service.corpus.local_library import LocalLibrary
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary


def open_backend(settings: RetrieverSettings) -> tuple[CorpusLibrary, Corpus]:
    """Opens what is active. Raises a RagError that says what is missing, damaged or out of reach."""
    if settings.backend is Backend.MILVUS:
        return _open_milvus(settings)
    home = settings.index_folder
    if home is None:
        raise StartupError("--index-folder is required with --backend local")
    corpus = _open_folder(settings, *read_active(home))
    open_folder = functools.partial(_open_folder, settings)
    return LocalLibrary(home, open_folder, refused=corpus.read_only_reason), corpus


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


def _open_folder(settings: RetrieverSettings, folder: Path, number_offset: int) -> LocalCorpus:
    return LocalCorpus(
        folder,
        load_index=functools.partial(FaissIndex.load, memory_map=settings.memory_map),
        verify=settings.verify,
        number_offset=number_offset,
        generations_kept=settings.generations_kept,
        requests_kept=settings.request_ids_kept,
        take_changes=not settings.read_only,
    )
