"""A document's version as an entity of Milvus, within Milvus' limits."""

import json
from typing import Any

import numpy as np

from rag_serving.errors import InvalidArgumentError
from retriever_service.milvus.schema import MAX_JSON_BYTES, MAX_KEY_BYTES, MAX_VARCHAR_BYTES, primary_key
from retriever_service.milvus.terms import fields_of
from retriever_service.types import Float32Array


def entity(
    name: str, row: int, key: str, title: str, text: str, metadata: str | None, embedding: Float32Array
) -> dict[str, Any]:
    """Returns the entity of a version.

    Raises InvalidArgumentError naming the field, below `name`, that Milvus has no room for.
    """
    _check(f"{name}.key", len(key.encode()), MAX_KEY_BYTES)
    _check(f"{name}.title", len(title.encode()), MAX_VARCHAR_BYTES)
    _check(f"{name}.text", len(text.encode()), MAX_VARCHAR_BYTES)
    fields = fields_of(metadata)
    _check(f"{name}.metadata", len(fields["metadata"].encode(errors="surrogatepass")), MAX_VARCHAR_BYTES)
    terms = json.dumps(fields["terms"], ensure_ascii=False, separators=(",", ":"))
    _check(
        f"{name}.metadata",
        len(terms.encode(errors="surrogatepass")),
        MAX_JSON_BYTES,
        " once its values are indexed",
    )
    return {
        "id": primary_key(key, row),
        "row": row,
        "key": key.encode().hex(),
        "embedding": np.ascontiguousarray(embedding, dtype=np.float32),
        "title": title,
        "text": text,
        **fields,
    }


def _check(field: str, size_bytes: int, most: int, when: str = "") -> None:
    if size_bytes > most:
        raise InvalidArgumentError(field, f"Milvus keeps at most {most} bytes{when}", size_bytes)
