"""The retriever's settings: flags, RAG_RETRIEVER_… in the environment, or a file."""

import enum
from pathlib import Path

from pydantic import Field, SecretStr, model_validator

from rag_serving.config import ServiceSettings

ENV_PREFIX = "RAG_RETRIEVER_"
_MILVUS_CHANGE_DOCUMENTS = 4000  # their rows are one entity of the log, of 65535 bytes


class Backend(enum.StrEnum):
    """Where documents and vectors are."""

    LOCAL = "local"
    MILVUS = "milvus"


class RetrieverSettings(ServiceSettings):
    """Serves documents and assembled contexts from an index that `rag-index build` made."""

    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(
        8051, ge=0, le=65535, description="HTTP port of /livez, /readyz and /metrics; 0 takes a free one"
    )
    backend: Backend = Field(
        Backend.LOCAL, description="where documents and vectors are: local, the index folder, or milvus"
    )
    index_folder: Path | None = Field(
        None,
        description="index folder that `rag-index build` wrote, or one generation in it; needed unless the"
        " backend is milvus",
    )
    milvus_uri: str = Field(
        "http://127.0.0.1:19530", pattern="^https?://", description="where Milvus is, http:// or https://"
    )
    milvus_token: SecretStr = Field(
        SecretStr(""), description="user:password or API key of Milvus; better set in the environment"
    )
    milvus_database: str = Field("", description="database of Milvus; none takes its default")
    milvus_collection: str = Field(
        "rag",
        pattern="^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        description="name of the corpus in Milvus, the alias of the collection that serves",
    )
    milvus_timeout_s: float = Field(
        10.0, gt=0, le=600, description="seconds that one call to Milvus may take"
    )
    milvus_lease_s: float = Field(
        10.0,
        gt=0,
        le=600,
        description="seconds after which another retriever may write where the one that did has died",
    )

    generator_checkpoint: str = Field(
        min_length=1,
        description="RAG checkpoint, or tokenizer, folder or hub name: whose tokenizer encodes the contexts",
    )
    question_tokenizer: str | None = Field(
        None,
        description="folder or hub name of the tokenizer that decodes question_input_ids; none takes"
        " question_encoder_tokenizer of the checkpoint, where there is one",
    )
    verify: bool = Field(True, description="check the sha256 of every index file before serving")

    default_n_docs: int | None = Field(
        None,
        ge=1,
        description="documents for a question that names no number; none takes the checkpoint's, or 5",
    )
    max_n_docs: int = Field(100, ge=1, description="documents for a question at most")
    max_batch: int = Field(256, ge=1, description="questions of a request at most")
    max_contexts: int = Field(4096, ge=1, description="questions times documents of a request at most")
    max_question_chars: int = Field(32_768, ge=1, description="characters of a question at most")
    max_get_documents: int = Field(1000, ge=1, description="keys and rows of a GetDocuments request at most")

    max_candidates: int = Field(
        16_384,
        ge=1,
        description="questions times documents times rescore_factor of a request at most",
    )
    max_exact_rows: int = Field(
        1000, ge=0, description="documents that a filter may leave and still be searched exactly"
    )
    recall_sample_rate: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of questions searched again exactly, in the background, for live_recall_ratio",
    )
    memory_map: bool = Field(
        False, description="map the index file instead of reading it: a start at once, pages as they are used"
    )

    index_devices: str = Field(
        "",
        pattern=r"^(all|(cuda:)?\d{1,4}(,(cuda:)?\d{1,4})*)?$",
        description="GPUs that hold the index of --backend local, a copy each: 'all', or '0,1' or"
        " 'cuda:0,cuda:1'; empty: the CPU. An index that faiss cannot put there stays on the CPU, and the log says why",
    )
    index_gpu_sharding: bool = Field(
        False, description="split the index over index_devices, for its size, in place of a copy on each"
    )
    index_gpu_float16: bool = Field(
        False, description="on GPUs, vectors of Flat and look-up tables of IVF,PQ in float16"
    )
    index_gpu_cagra: bool = Field(
        False, description="on GPUs, build a CAGRA graph of a Flat or HNSW index; needs ragpair[cuvs]"
    )
    index_gpu_temp_memory_mib: int | None = Field(
        None, ge=0, description="scratch memory that faiss sets aside on each GPU; none takes its own amount"
    )

    read_only: bool = Field(False, description="take no changes; search what another retriever writes")
    embedding_model: str | None = Field(
        None,
        description="passage encoder, folder or hub name, for documents that come without embeddings; it must be"
        " the one that the index was made with",
    )
    embedding_device: str = Field("cpu", description="where the passage encoder runs: cpu, cuda or cuda:N")
    max_change_documents: int = Field(
        1000, ge=1, description="documents of a change, and of a page of ListDocuments, at most"
    )
    max_text_bytes: int = Field(1 << 20, ge=1, description="bytes of a document's title or text at most")
    compact_after: int = Field(
        100_000,
        ge=0,
        description="changed documents after which a compaction begins by itself; 0 leaves it to CompactIndex",
    )
    generations_kept: int = Field(
        2,
        ge=1,
        description="generations that serve at once, for requests that pin one; each holds its index in memory",
    )
    request_ids_kept: int = Field(
        100_000, ge=1, description="request_ids of changes that are remembered, the newest"
    )
    activation_root: Path | None = Field(
        None,
        description="ActivateIndex takes folders below this one; none takes index_folder's parent, where there"
        " is an index_folder",
    )
    follow_interval_s: float = Field(
        1.0,
        gt=0,
        le=3600,
        description="seconds after which a retriever that takes no changes looks for those of another",
    )

    max_combined_length: int | None = Field(
        None, ge=8, description="tokens of a context at most; none takes the checkpoint's, or 300"
    )
    title_sep: str | None = Field(
        None, description="between title and text; none takes the checkpoint's, or ' / '"
    )
    doc_sep: str | None = Field(
        None, description="between text and question; none takes the checkpoint's, or ' // '"
    )
    prefix: str | None = Field(
        None, description="before each context; none takes the checkpoint's, or nothing"
    )

    batch_window_ms: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="milliseconds in which nobody may come before concurrent requests that gathered are searched",
    )
    max_search_batch: int = Field(256, ge=1, description="questions of one search at most")
    max_queued_questions: int = Field(
        4096, ge=1, description="questions accepted and not yet answered, before RESOURCE_EXHAUSTED"
    )
    search_threads: int = Field(
        0,
        ge=0,
        description="threads of one search in faiss; 0 takes every core, and one for less than 64 MiB of vectors",
    )
    document_cache_bytes: int = Field(
        128 << 20,
        ge=0,
        description="memory for documents and embeddings that were read, in bytes; 0 keeps none",
    )
    context_cache_bytes: int = Field(
        128 << 20, ge=0, description="memory for documents that were tokenized, in bytes; 0 keeps none"
    )
    assembly_threads: int = Field(
        1,
        ge=1,
        le=256,
        description="threads that fetch, score and assemble; more help where little is cached and cores are many",
    )

    @model_validator(mode="after")
    def _defaults_fit_limits(self) -> "RetrieverSettings":
        if self.default_n_docs is not None and self.default_n_docs > self.max_n_docs:
            raise ValueError(f"default_n_docs {self.default_n_docs} is above max_n_docs {self.max_n_docs}")
        return self

    @model_validator(mode="after")
    def _fits_backend(self) -> "RetrieverSettings":
        if self.backend is Backend.LOCAL and self.index_folder is None:
            raise ValueError("index_folder is required with the backend local")
        if self.backend is Backend.MILVUS and self.max_change_documents > _MILVUS_CHANGE_DOCUMENTS:
            raise ValueError(
                f"max_change_documents {self.max_change_documents} is above {_MILVUS_CHANGE_DOCUMENTS}, the most"
                " with the backend milvus"
            )
        return self
