"""Forward on the wire: its request made of plain data, its outputs put together from pieces."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rag.generator.v1 import forward_pb2
from rag.tensor.v1 import tensor_pb2
from rag_client import messages, types
from rag_serving import tensor_codec

ForwardInput = messages.Input | types.EncoderOutputs | None

_TENSORS = ("decoder_input_ids", "decoder_attention_mask", "labels")
_DTYPES = {tensor_pb2.DTYPE_FLOAT32: "<f4", tensor_pb2.DTYPE_INT64: "<i8"}


def forward_request(given: ForwardInput, options: Mapping[str, Any]) -> forward_pb2.ForwardRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    request = forward_pb2.ForwardRequest()
    if isinstance(given, types.EncoderOutputs):
        _set_encoder_outputs(request.encoder_outputs, given)
    elif given is not None:
        messages.set_input(request, given)
    for name, value in options.items():
        if value is None:
            continue
        if name in _TENSORS:
            getattr(request, name).CopyFrom(tensor_codec.encode(messages.wire_integers(value)))
        elif name == "outputs":
            request.output_mask.paths.extend(value)
        else:
            messages.set_option(request, name, value)
    return request


class ForwardAssembly:
    """Takes a call's parts in order; `outputs` is there once all of them came."""

    def __init__(self) -> None:
        self._header: forward_pb2.ForwardHeader | None = None
        self._tensors: dict[int, bytearray] = {}

    def add(self, part: forward_pb2.ForwardResponse) -> None:
        """Takes a part. Raises ValueError for pieces that do not follow one another."""
        if part.WhichOneof("part") == "header":
            self._header = part.header
            return
        piece = part.piece
        data = self._tensors.setdefault(piece.tensor, bytearray())
        if len(data) != piece.offset:
            raise ValueError(f"tensor {piece.tensor}: a piece at {piece.offset} after {len(data)} bytes")
        data += piece.data

    def outputs(self) -> types.ForwardOutputs:
        """The outputs, None and () where there are none. Raises ValueError where bytes are missing."""
        header = self._header
        if header is None:
            raise ValueError("the answer has no header")
        found: dict[str, Any] = {}
        for field, value in header.outputs.ListFields():
            if isinstance(value, str):
                found[field.name] = value
            elif isinstance(value, forward_pb2.TensorLayout):
                found[field.name] = self._array(value)
            else:
                found[field.name] = tuple(self._array(one) for one in value)
        return types.ForwardOutputs(
            n_docs=header.n_docs,
            checkpoint_digest=header.checkpoint_digest,
            index_generation=header.index_generation,
            past_key_values_expires_s=header.past_key_values_expires_s,
            **found,
        )

    def _array(self, layout: forward_pb2.TensorLayout) -> npt.NDArray[Any]:
        raw = np.frombuffer(self._tensors.get(layout.tensor, bytearray()), _DTYPES[layout.dtype])
        return raw.reshape(tuple(layout.shape)).astype(raw.dtype.newbyteorder("="), copy=False)


def _set_encoder_outputs(message: forward_pb2.EncoderOutputs, given: types.EncoderOutputs) -> None:
    states = np.asarray(given.last_hidden_state, np.float32)
    message.last_hidden_state.CopyFrom(tensor_codec.encode(states))
    message.doc_scores.CopyFrom(tensor_codec.encode(np.asarray(given.doc_scores, np.float32)))
    if given.context_attention_mask is not None:
        mask = messages.wire_integers(given.context_attention_mask)
        message.context_attention_mask.CopyFrom(tensor_codec.encode(mask))
