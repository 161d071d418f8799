"""The keyword arguments of the client's calls, by the names of the contract and of Hugging Face."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from rag_client.types import Strategy

StrategyName = Strategy | Literal["RAG_SEQUENCE", "RAG_TOKEN"]
SequenceDecodingName = Literal["THOROUGH", "FAST"]
CompatibilityName = Literal["MASKED", "HF"]


class RetrievalOptions(TypedDict, total=False):
    """How documents are found; not used with contexts. None takes the service's default.

    `filter` is a mapping in the form of rag_client.filters.
    """

    n_docs: int | None
    prefix: str | None
    nprobe: int | None
    ef_search: int | None
    rescore_factor: int | None
    filter: Mapping[str, Any] | None
    score_threshold: float | None
    max_combined_length: int | None
    truncate_question_last: bool | None


class GenerationOptions(TypedDict, total=False):
    """Hugging Face's generation arguments; None and what is left out come from the checkpoint.

    `early_stopping` is True, False or "never"; `allowed_sequences` are the only answers that may be given.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    num_beams: int | None
    num_return_sequences: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    decoder_start_token_id: int | None
    bos_token_id: int | None
    eos_token_ids: Sequence[int] | None
    pad_token_id: int | None
    allowed_sequences: Sequence[Sequence[int]] | None
    renormalize_logits: bool | None
    seed: int | None


class GenerateOptions(RetrievalOptions, GenerationOptions, total=False):
    """Everything that Generate can be told beside its input.

    `pinned_request` is a Generation's: it sets everything, and the arguments beside it change it.
    """

    strategy: StrategyName | None
    sequence_decoding: SequenceDecodingName | None
    compatibility: CompatibilityName | None
    do_deduplication: bool | None
    exclude_bos_score: bool | None
    include_documents: bool | None
    include_provenance: bool | None
    abstain_below: float | None
    expected_checkpoint_digest: str | None
    expected_index_generation: int | None
    expected_contexts_digest: str | None
    pinned_request: Mapping[str, Any] | None
    priority: int | None


class StreamOptions(GenerateOptions, total=False):
    """Everything that GenerateStream can be told: a piece has so many tokens, or has waited so many seconds."""

    piece_tokens: int | None
    piece_wait_s: float | None


class ScoreOptions(RetrievalOptions, total=False):
    """Everything that Score can be told beside its input and its targets."""

    strategy: StrategyName | None
    exclude_bos_score: bool | None
    reduce_loss: bool | None
    label_smoothing: float | None
    compatibility: CompatibilityName | None
    priority: int | None


class ForwardOptions(RetrievalOptions, total=False):
    """Everything that Forward can be told beside its input, by Hugging Face's names.

    `outputs` are fields of ForwardOutputs, and then nothing else is returned.
    """

    model_class: Literal["RAG_MODEL", "RAG_SEQUENCE", "RAG_TOKEN"] | None
    decoder_input_ids: npt.NDArray[np.integer[Any]] | None
    decoder_attention_mask: npt.NDArray[np.integer[Any]] | None
    labels: npt.NDArray[np.integer[Any]] | None
    exclude_bos_score: bool | None
    reduce_loss: bool | None
    label_smoothing: float | None
    do_marginalize: bool | None
    use_cache: bool | None
    past_key_values: str | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_retrieved: bool | None
    outputs: Sequence[str] | None


class RetrieveOptions(TypedDict, total=False):
    """Everything that Retrieve can be told beside its questions."""

    n_docs: int | None
    prefix: str | None
    nprobe: int | None
    ef_search: int | None
    rescore_factor: int | None
    filter: Mapping[str, Any] | None
    score_threshold: float | None
    max_combined_length: int | None
    truncation: Literal["KEEP_QUESTION", "QUESTION_LAST"] | None
    include_retrieved_doc_embeds: bool | None
    include_documents: bool | None
    skip_contexts: bool | None
