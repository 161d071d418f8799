"""Forward's messages <-> the service's own types; whatever is wrong is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from generator_service.engine.pass_messages import Array
from generator_service.forward import ContextBatch, EncodedBatch, ForwardResult
from generator_service.request_checks import RequestLimits, check_vocabulary
from generator_service.types import ModelClass
from rag.generator.v1 import forward_pb2, generation_pb2
from rag.tensor.v1 import tensor_pb2
from rag_serving import tensor_codec
from rag_serving.errors import InvalidArgumentError
from rag_serving.tensor_codec import FLOATS, INTEGERS

PIECE_BYTES = 1 << 20
MODEL_CLASSES = {
    forward_pb2.MODEL_CLASS_UNSPECIFIED: None,
    forward_pb2.MODEL_CLASS_RAG_MODEL: ModelClass.RAG_MODEL,
    forward_pb2.MODEL_CLASS_RAG_SEQUENCE: ModelClass.RAG_SEQUENCE,
    forward_pb2.MODEL_CLASS_RAG_TOKEN: ModelClass.RAG_TOKEN,
}
WIRE_MODEL_CLASSES = {value: number for number, value in MODEL_CLASSES.items() if value is not None}
_MASKS = frozenset({"int32", "int64", "bool"})
_DTYPES = {"<f4": tensor_pb2.DTYPE_FLOAT32, "<i8": tensor_pb2.DTYPE_INT64}
_ALWAYS = ("logits", "doc_scores", "generator_enc_last_hidden_state", "question_encoder_last_hidden_state")
_ATTENTIONS = (
    "question_enc_attentions",
    "generator_enc_attentions",
    "generator_dec_attentions",
    "generator_cross_attentions",
)
_HIDDEN_STATES = (
    "question_enc_hidden_states",
    "generator_enc_hidden_states",
    "generator_dec_hidden_states",
)
_RETRIEVED = (
    "retrieved_doc_embeds",
    "retrieved_doc_ids",
    "context_input_ids",
    "context_attention_mask",
)


def read_outputs(request: forward_pb2.ForwardRequest) -> list[str]:
    """The outputs asked for. Raises InvalidArgumentError for a path that is no field of ForwardOutputs."""
    fields = forward_pb2.ForwardOutputs.DESCRIPTOR.fields_by_name
    paths = list(dict.fromkeys(request.output_mask.paths))
    for index, path in enumerate(paths):
        if path not in fields:
            raise InvalidArgumentError(f"output_mask.paths[{index}]", "is no field of ForwardOutputs", path)
    if paths:
        return paths
    return [
        *(["loss"] if request.HasField("labels") else []),
        *_ALWAYS,
        *(_ATTENTIONS if request.output_attentions else ()),
        *(_HIDDEN_STATES if request.output_hidden_states else ()),
        *(_RETRIEVED if request.output_retrieved else ()),
    ]


def read_contexts(contexts: generation_pb2.Contexts, limits: RequestLimits) -> ContextBatch:
    """Contexts that the caller retrieved, pads wherever it put them."""
    ids = tensor_codec.decode(
        contexts.context_input_ids, "contexts.context_input_ids", dtypes=INTEGERS, ndim=2, widen=True
    )
    scores = _read_scores(contexts.doc_scores, "contexts.doc_scores", limits)
    rows = scores.size
    if ids.shape[0] != rows or ids.shape[1] == 0:
        raise InvalidArgumentError(
            "contexts.context_input_ids", f"must be [{rows}, length] for doc_scores", list(ids.shape)
        )
    if limits.max_positions is not None and ids.shape[1] > limits.max_positions:
        raise InvalidArgumentError(
            "contexts.context_input_ids", f"at most {limits.max_positions} tokens", ids.shape[1]
        )
    check_vocabulary(ids, limits.vocab_size, "contexts.context_input_ids")
    mask = _read_context_mask(
        contexts.context_attention_mask, "contexts.context_attention_mask", ids.shape, scores
    )
    return ContextBatch(ids, mask, scores)


def read_encoder_outputs(outputs: forward_pb2.EncoderOutputs, limits: RequestLimits) -> EncodedBatch:
    """Contexts that the caller encoded; the worker checks their width."""
    hidden = tensor_codec.decode(
        outputs.last_hidden_state,
        "encoder_outputs.last_hidden_state",
        dtypes=FLOATS,
        ndim=3,
        finite=True,
        widen=True,
    )
    scores = _read_scores(outputs.doc_scores, "encoder_outputs.doc_scores", limits)
    if hidden.shape[0] != scores.size or 0 in hidden.shape:
        raise InvalidArgumentError(
            "encoder_outputs.last_hidden_state",
            f"must be [{scores.size}, length, d_model] for doc_scores",
            list(hidden.shape),
        )
    mask = None
    if outputs.HasField("context_attention_mask"):
        mask = _read_context_mask(
            outputs.context_attention_mask,
            "encoder_outputs.context_attention_mask",
            hidden.shape[:2],
            scores,
        )
    return EncodedBatch(hidden, mask, scores)


def read_question_tokens(
    tokens: generation_pb2.QuestionTokens, limits: RequestLimits
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """input_ids and attention_mask [batch, length], pads wherever the caller put them."""
    ids = tensor_codec.decode(
        tokens.input_ids, "question_tokens.input_ids", dtypes=INTEGERS, ndim=2, widen=True
    )
    limits.check_question_ids(ids, "question_tokens.input_ids")
    if not tokens.HasField("attention_mask"):
        return ids, None
    mask = _read_mask(tokens.attention_mask, "question_tokens.attention_mask")
    if mask.shape != ids.shape:
        raise InvalidArgumentError(
            "question_tokens.attention_mask", f"must have the shape {list(ids.shape)}", list(mask.shape)
        )
    return ids, _with_a_one(mask, "question_tokens.attention_mask")


def read_targets(
    request: forward_pb2.ForwardRequest, batch: int | None, limits: RequestLimits
) -> dict[str, npt.NDArray[np.int64] | None]:
    """decoder_input_ids, decoder_attention_mask and labels, [batch, length]; batch is None where a handle knows it."""
    found: dict[str, npt.NDArray[np.int64] | None] = dict.fromkeys(
        ("decoder_input_ids", "decoder_attention_mask", "labels")
    )
    for name in ("decoder_input_ids", "labels"):
        if request.HasField(name):
            tokens = tensor_codec.decode(getattr(request, name), name, dtypes=INTEGERS, ndim=2, widen=True)
            limits.check_labels(tokens, tokens.shape[0] if batch is None else batch, name)
            found[name] = tokens
    ids, labels = found["decoder_input_ids"], found["labels"]
    if ids is not None and labels is not None and ids.shape != labels.shape:
        raise InvalidArgumentError(
            "labels", f"must have the shape of decoder_input_ids, {list(ids.shape)}", list(labels.shape)
        )
    if request.HasField("decoder_attention_mask"):
        mask = _read_mask(request.decoder_attention_mask, "decoder_attention_mask")
        target = labels if ids is None else ids
        wrong = target is None or mask.shape[0] != target.shape[0]
        if wrong or (not request.past_key_values and target is not None and mask.shape != target.shape):
            raise InvalidArgumentError(
                "decoder_attention_mask", "must have the shape of decoder_input_ids", list(mask.shape)
            )
        found["decoder_attention_mask"] = mask
    return found


def write_parts(
    result: ForwardResult, header: forward_pb2.ForwardHeader
) -> Iterator[forward_pb2.ForwardResponse]:
    """The header, filled in, and then every tensor's bytes."""
    header.n_docs, header.index_generation = result.n_docs, result.generation
    header.outputs.past_key_values = result.past_key_values
    for number, one in enumerate(result.arrays):
        layout = _layout(number, one.array)
        if one.layer is None:
            getattr(header.outputs, one.name).CopyFrom(layout)
        else:
            getattr(header.outputs, one.name).append(layout)
    yield forward_pb2.ForwardResponse(header=header)
    for number, one in enumerate(result.arrays):
        for offset in range(0, len(one.array.data), PIECE_BYTES):
            data = one.array.data[offset : offset + PIECE_BYTES]
            piece = forward_pb2.TensorPiece(tensor=number, offset=offset, data=data)
            yield forward_pb2.ForwardResponse(piece=piece)


def _layout(number: int, array: Array) -> forward_pb2.TensorLayout:
    return forward_pb2.TensorLayout(tensor=number, dtype=_DTYPES[array.dtype], shape=array.shape)


def _read_scores(tensor: tensor_pb2.Tensor, field: str, limits: RequestLimits) -> npt.NDArray[np.float32]:
    scores = tensor_codec.decode(tensor, field, dtypes=FLOATS, ndim=2, widen=True)
    limits.check_batch(scores.shape[0], field)
    limits.check_n_docs(scores.shape[1], field)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise InvalidArgumentError(field, "must be finite, or -inf for a document not there")
    if np.isneginf(scores).all(axis=1).any():
        raise InvalidArgumentError(field, "every question needs a document that is there")
    return scores


def _read_mask(tensor: tensor_pb2.Tensor, field: str) -> npt.NDArray[np.int64]:
    mask = tensor_codec.decode(tensor, field, dtypes=_MASKS, ndim=2, widen=True).astype(np.int64)
    if ((mask != 0) & (mask != 1)).any():
        raise InvalidArgumentError(field, "must hold zeros and ones", int(mask[(mask != 0) & (mask != 1)][0]))
    return mask


def _read_context_mask(
    tensor: tensor_pb2.Tensor, field: str, shape: tuple[int, ...], doc_scores: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    mask = _read_mask(tensor, field)
    if mask.shape != shape:
        raise InvalidArgumentError(field, f"must have the shape {list(shape)}", list(mask.shape))
    mask[np.isneginf(doc_scores).reshape(-1), 0] = 1  # attention over nothing is not a number, and spreads
    return _with_a_one(mask, field)


def _with_a_one(mask: npt.NDArray[np.int64], field: str) -> npt.NDArray[np.int64]:
    empty = np.nonzero(mask.sum(axis=1) == 0)[0]
    if empty.size:
        raise InvalidArgumentError(f"{field}[{int(empty[0])}]", "must hold a one")
    return mask
