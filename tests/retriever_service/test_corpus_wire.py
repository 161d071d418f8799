"""Documents as messages."""

import json

import pytest

from rag_serving import struct_codec
from retriever_service import corpus_wire
from retriever_service.types import Document

HUGE = 10**400


@pytest.mark.parametrize(
    ("metadata", "sent"),
    [
        ({"n": HUGE}, {"n": str(HUGE)}),
        ({"a": [{"n": -HUGE}, 5, -2.5, True]}, {"a": [{"n": str(-HUGE)}, 5, -2.5, True]}),
        ({"n": 10**300}, {"n": 1e300}),
    ],
)
def test_integers_beyond_doubles_go_as_their_digits(
    metadata: dict[str, object], sent: dict[str, object]
) -> None:
    """Corpora built before such were refused hold them, and every answer with the document was INTERNAL."""
    found = corpus_wire.document(Document(0, "k", "", "text", json.dumps(metadata)))
    assert struct_codec.decode(found.metadata) == sent
