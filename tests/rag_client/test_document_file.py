"""Files of documents to upsert, as the `rag` command reads them."""

import io
import json

import pytest

from rag_client.document_file import DocumentBatch, DocumentFileError, read_batches
from rag_client.errors import FieldViolation

FINE = b'{"key": "a", "text": "b"}\n'


def batches(given: bytes, batch_size: int = 2) -> list[DocumentBatch]:
    return list(read_batches(io.BytesIO(given), "new.jsonl", batch_size))


def test_byte_order_mark_before_the_first_line_is_no_text() -> None:
    """Editors on Windows write one; `rag-index build` takes it, too."""
    (batch,) = batches(b"\xef\xbb\xbf" + FINE)
    assert [one.key for one in batch.documents] == ["a"]
    assert batch.size_bytes == len(FINE) + 3
    with pytest.raises(DocumentFileError, match="line 2: not JSON"):
        batches(FINE + b"\xef\xbb\xbf" + FINE)


@pytest.mark.parametrize("embedding", [[True, 1.0], ["3", "4"], [1, None], "y", [[1]], {"a": 1}])
def test_embedding_that_is_no_list_of_numbers_is_refused_by_line(embedding: object) -> None:
    line = json.dumps({"key": "c", "text": "d", "embedding": embedding}).encode()
    with pytest.raises(DocumentFileError, match=r"new\.jsonl, line 1: embedding must be a list of numbers"):
        batches(line)


@pytest.mark.parametrize(
    ("field", "description", "said"),
    [
        ("documents[1].text", "is empty", ("new.jsonl, line 5: text", "is empty")),
        ("documents[1]", "is wrong", ("new.jsonl, line 5", "is wrong")),
        ("embeddings[0]", "is zero", ("new.jsonl, line 4: embedding", "is zero")),
        (
            "documents[1].key",
            "is documents[0]'s already, got 'documents[0]'",
            ("new.jsonl, line 5: key", "is new.jsonl, line 4's already, got 'documents[0]'"),
        ),
        ("documents[7].key", "is empty", ("documents[7].key", "is empty")),
        ("request_id", "is too long", ("request_id", "is too long")),
    ],
)
def test_what_the_service_refuses_of_a_batch_is_placed_in_the_file(
    field: str, description: str, said: tuple[str, str]
) -> None:
    """The number of a document in a batch that nobody has seen helps nobody to find the line."""
    _, second = batches(FINE + b"\n" + FINE + FINE + FINE)
    assert second.places == ["new.jsonl, line 4", "new.jsonl, line 5"]
    placed = second.placed(FieldViolation(field, description))
    assert (placed.field, placed.description) == said
