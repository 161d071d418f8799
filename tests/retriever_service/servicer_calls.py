"""Calls of rag.retriever.v1 and what comes back of them."""

from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag.tensor.v1 import tensor_pb2
from rag_serving import tensor_codec

DIM = 16
VECTORS = np.random.default_rng(6).standard_normal((3, DIM)).astype(np.float32)
TEXTS = ["Who was  king ?", "where is the lake", "which moon"]


def request(**fields: Any) -> retriever_service_pb2.RetrieveRequest:
    whole: dict[str, Any] = {"question_hidden_states": tensor_codec.encode(VECTORS), "n_docs": 4}
    if "question_input_ids" not in fields:
        whole["question_texts"] = document_pb2.QuestionTexts(texts=TEXTS)
    return retriever_service_pb2.RetrieveRequest(**(whole | fields))


def array(tensor: tensor_pb2.Tensor) -> Any:
    return tensor_codec.decode(tensor, "answer")


def tensor(values: Any, dtype: Any = np.float32) -> tensor_pb2.Tensor:
    return tensor_codec.encode(np.asarray(values, dtype=dtype))


def violated_fields(error: grpc.aio.AioRpcError) -> list[str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return [violation.field for violation in bad.field_violations]
    return []
