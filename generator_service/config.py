"""The generator's settings: flags, RAG_GENERATOR_… in the environment, or a file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from generator_service.types import Batching, Pooling, Strategy
from rag_serving.config import ServiceSettings

ENV_PREFIX = "RAG_GENERATOR_"


class GeneratorSettings(ServiceSettings):
    """Answers questions with a RAG checkpoint, over the documents that a retriever finds."""

    grpc_port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(
        8052, ge=0, le=65535, description="HTTP port of /livez, /readyz and /metrics; 0 takes a free one"
    )
    rag_checkpoint: str | None = Field(
        None, description="RAG checkpoint: a folder or hub name with question encoder and generator in one"
    )
    question_encoder: str | None = Field(
        None, description="question encoder alone: a folder or hub name, beside --generator"
    )
    generator: str | None = Field(None, description="seq2seq generator alone: a folder or hub name")
    retriever_address: str = Field(
        "localhost:50051",
        description="host:port or gRPC target of the retriever; empty serves only questions that bring their contexts",
    )
    default_strategy: Strategy | None = Field(
        None, description="RAG_SEQUENCE or RAG_TOKEN; none takes what the checkpoint's architecture says"
    )
    pooling: Pooling | None = Field(
        None,
        description="first_output, pooler, mean or cls: how the question encoder's output becomes a vector;"
        " none takes the checkpoint's, or first_output as Hugging Face does",
    )
    normalize: bool | None = Field(
        None, description="divide question vectors by their norm; none takes the checkpoint's, or no"
    )
    score_scale: float | None = Field(
        None,
        gt=0,
        description="factor on question vectors and so on doc_scores; none takes the checkpoint's, or 1",
    )
    embedding_model: str | None = Field(
        None,
        description="name or digest of the index's embedding model that the question encoder fits; none takes the"
        " checkpoint's, or accepts any",
    )
    index_metric: Literal["inner_product", "l2", "any"] = Field(
        "inner_product",
        description="similarity that must have found the documents; the paper's is the inner product",
    )
    retriever_check_s: float = Field(
        2.0, gt=0, description="seconds between looks at whether the retriever is there and fits"
    )

    devices: tuple[str, ...] = Field(
        (),
        description="devices, one worker process each: cpu or cuda:0,cuda:1; none takes every GPU, or the CPU",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type of the generator's weights; scores are float32 always"
    )
    cuda_graphs: bool = Field(
        True,
        description="on a GPU, replay decoder steps as CUDA graphs, captured at start for steps of up to"
        " --max-step-rows rows",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 holds linear layers as int8: faster on the CPU, answers change a little; float32 only",
    )
    decoder: Literal["auto", "general"] = Field(
        "auto",
        description="auto takes our own decoder for BART and T5; general runs transformers' model, slowly",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 takes every core it may use")
    cache_budget_mib: int = Field(
        0,
        ge=0,
        description="MiB of keys and values on a device; 0 takes a quarter of memory, or most of a GPU's",
    )
    max_step_rows: int = Field(1024, ge=1, description="decoder rows of one step")
    max_step_context_tokens: int = Field(4096, ge=1, description="context tokens encoded in one step")
    batching: Batching = Field(
        Batching.CONTINUOUS,
        description="CONTINUOUS lets questions join and leave at each step; GATHER runs one batch to its end and"
        " answers it whole before the next, as a dynamic batcher would, GATHER_EARLY gives each of its answers when it"
        " is there: both for comparison (make load), not for service",
    )
    heartbeat_s: float = Field(1.0, gt=0, description="seconds between a worker's signs of life")
    heartbeat_timeout_s: float = Field(
        120.0, gt=0, description="seconds of silence until a worker is killed and started again"
    )

    max_batch_size: int = Field(64, ge=1, description="questions of a request at most")
    max_n_docs: int = Field(100, ge=1, description="documents for a question at most")
    max_num_beams: int = Field(32, ge=1, description="beams, or sampled answers, of a question at most")
    max_answer_length: int = Field(512, ge=2, description="tokens of an answer at most, start token counted")
    max_question_chars: int = Field(32_768, ge=1, description="characters of a question at most")
    max_queued_questions: int = Field(
        1024, ge=1, description="questions accepted and not yet answered, before RESOURCE_EXHAUSTED"
    )

    max_forward_mib: int = Field(
        256, ge=1, le=2048, description="MiB of the outputs of one forward pass at most"
    )
    max_past_key_values: int = Field(
        64, ge=0, description="past_key_values that forward passes leave on a device at most"
    )
    past_key_values_mib: int = Field(
        256, ge=0, description="MiB of all past_key_values held on a device, beside the cache budget"
    )
    past_key_values_expires_s: float = Field(
        60.0, gt=0, description="seconds without use until past_key_values are forgotten"
    )

    @model_validator(mode="after")
    def _one_source(self) -> GeneratorSettings:
        if self.rag_checkpoint is None and self.generator is None:
            raise ValueError("give --rag-checkpoint, or --generator with --question-encoder")
        if self.rag_checkpoint is not None and (self.generator or self.question_encoder):
            raise ValueError("give either --rag-checkpoint or --generator and --question-encoder, not both")
        return self
