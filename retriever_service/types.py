"""The nouns of the retriever, free of protobuf, grpc and faiss."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from retriever_service.filters import Filter

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

MAX_NORM = 1e16
"""Longest vector taken: the square of its length, which an L2 search computes, stays far inside float32."""


MAX_METADATA_DEPTH = 24
"""Objects and lists within one another in a document's metadata: protobuf's reader gives up at a little over 30."""


class Metric(enum.StrEnum):
    """Similarity that an index searches by; doc_scores are inner products whichever it is."""

    INNER_PRODUCT = "inner_product"
    L2 = "l2"


class Truncation(enum.StrEnum):
    """What is cut where a context is longer than max_combined_length."""

    KEEP_QUESTION = "keep_question"
    QUESTION_LAST = "question_last"


@dataclass(frozen=True, slots=True)
class Document:
    """A passage. `row` is its number in the index, what Hugging Face calls a retrieved_doc_id.

    `metadata` is a JSON object as text, or None; `etag` names this version of the document.
    """

    row: int
    key: str
    title: str
    text: str
    metadata: str | None = None
    etag: str = ""


class Selection:
    """The rows that a search may find, ascending and distinct; two are equal only if they are one object."""

    def __init__(self, rows: Int64Array) -> None:
        self.rows = rows
        self._bitmap: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def rows_before(self, next_row: int) -> Int64Array:  # noqa: ARG002  (all are known)
        """Returns the rows, for an index that holds none from `next_row` on; there may be later ones among them."""
        return self.rows

    def bitmap(self, ntotal: int) -> npt.NDArray[np.uint8]:
        """Returns one bit a row, the lowest of each byte first; made once, for one `ntotal`."""
        if self._bitmap is None:
            chosen = np.zeros(ntotal, dtype=np.bool_)
            chosen[self.rows] = True
            self._bitmap = np.packbits(chosen, bitorder="little")
        return self._bitmap


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """Search knobs of one request; 0 keeps the index's own setting."""

    nprobe: int = 0
    ef_search: int = 0


@dataclass(frozen=True, slots=True)
class Query:
    """A batch of questions, already checked.

    `question_hidden_states` is float32 [batch, dim] and finite. The questions come as `question_texts`
    (they stand verbatim) or as `question_input_ids` (decoded by the question tokenizer); neither is
    needed with `skip_contexts`. `prefix` None takes the generator's own. Only documents that meet `filter` and
    whose doc_score is at least `score_threshold` are found; n_docs times `rescore_factor` candidates are
    compared by their stored embeddings where the index's scores are not exact.
    """

    question_hidden_states: Float32Array
    n_docs: int
    max_combined_length: int
    question_texts: Sequence[str] | None = None
    question_input_ids: Int64Array | None = None
    prefix: str | None = None
    search_parameters: SearchParameters = field(default_factory=SearchParameters)
    truncation: Truncation = Truncation.KEEP_QUESTION
    skip_contexts: bool = False
    filter: Filter | None = None
    score_threshold: float | None = None
    rescore_factor: int = 1


@dataclass(frozen=True, slots=True)
class Contexts:
    """The generator's input, padded on the right to the longest context.

    `input_ids` and `attention_mask` are int64 [contexts, length]; `question_cut` is bool [contexts], true
    where part of the question did not fit.
    """

    input_ids: Int64Array
    attention_mask: Int64Array
    question_cut: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The documents of a batch, best first; columns past `n_docs_found[i]` pad question i.

    `doc_scores` float32 [batch, n_docs], -inf in padding; `rows` int64 [batch, n_docs], -1 in padding;
    `doc_embeds` float32 [batch, n_docs, dim], 0 in padding; `documents` [batch][n_docs], None in padding;
    `contexts` has batch * n_docs rows, empty ones in padding, and is None where they were skipped.
    """

    doc_scores: Float32Array
    rows: Int64Array
    doc_embeds: Float32Array
    documents: Sequence[Sequence[Document | None]]
    n_docs_found: Sequence[int]
    contexts: Contexts | None
    generation: int


def metadata_depth(metadata: object) -> int:
    """Levels of objects and lists in what JSON gives; it stops counting past MAX_METADATA_DEPTH."""
    depth, level = 0, [metadata]
    while level and depth <= MAX_METADATA_DEPTH:
        containers = [one for one in level if isinstance(one, dict | list)]
        level = [x for one in containers for x in (one.values() if isinstance(one, dict) else one)]
        depth += bool(containers)
    return depth
