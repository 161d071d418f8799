"""Forward passes between the service and its workers: whole batches in, every output out, as raw bytes."""

from __future__ import annotations

import msgspec

from generator_service.types import ModelClass


class Array(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor: numpy's name of its type, its shape, its little-endian bytes in C order."""

    dtype: str
    shape: list[int]
    data: bytes


class NamedArray(msgspec.Struct, frozen=True, kw_only=True):
    """One output by Hugging Face's name; layer counts hidden states and attentions, and is None elsewhere."""

    name: str
    layer: int | None
    array: Array


class QuestionPass(msgspec.Struct, frozen=True, kw_only=True, tag="question_pass"):
    """A padded batch for the question encoder, int64 [batch, length]; no mask leaves it to the encoder."""

    request_id: int
    outputs: list[str]
    input_ids: Array
    attention_mask: Array | None
    priority: int = 0
    deadline_s: float | None = None


class ForwardPass(msgspec.Struct, frozen=True, kw_only=True, tag="forward_pass"):
    """A padded batch for the generator; rows are batch * n_docs, as Hugging Face's forward has them.

    Either context_input_ids or encoder_last_hidden_state is given, or neither with past_key_values, the handle of an
    earlier pass with use_cache. context_attention_mask may be absent with the second, doc_scores with the third.
    """

    request_id: int
    outputs: list[str]
    model_class: ModelClass
    context_input_ids: Array | None
    encoder_last_hidden_state: Array | None
    context_attention_mask: Array | None
    doc_scores: Array | None
    decoder_input_ids: Array | None
    decoder_attention_mask: Array | None
    labels: Array | None
    exclude_bos_score: bool
    reduce_loss: bool
    label_smoothing: float
    do_marginalize: bool
    bos_token_id: int | None
    use_cache: bool
    past_key_values: str
    priority: int = 0
    deadline_s: float | None = None


class ReleasePast(msgspec.Struct, frozen=True, kw_only=True, tag="release_past"):
    """Forget a handle."""

    request_id: int
    past_key_values: str


class PassDone(msgspec.Struct, frozen=True, kw_only=True, tag="pass_done"):
    """The outputs asked for, and the handle of what use_cache left; n_docs is that of the pass."""

    request_id: int
    arrays: list[NamedArray]
    past_key_values: str = ""
    n_docs: int = 0


Pass = QuestionPass | ForwardPass
