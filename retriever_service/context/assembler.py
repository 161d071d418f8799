"""Question and document become one context: Hugging Face's RagRetriever.postprocess_docs, and a kinder cut.

Source: transformers 5.23, models/rag/retrieval_rag.py. What differs on purpose: contexts are padded to the
longest of the response, not to max_combined_length; and Truncation.KEEP_QUESTION cuts the document where
Hugging Face cuts the question, which stands last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from retriever_service.context.tokenizer import ContextTokenizer
from retriever_service.types import Contexts, Truncation


@dataclass(frozen=True, slots=True)
class ContextParts:
    """What one context is made of, before it is put together."""

    title: str
    text: str
    question: str


class ContextAssembler:
    """Puts contexts together: prefix + title + title_sep + text + doc_sep + question."""

    def __init__(self, tokenizer: ContextTokenizer, *, title_sep: str, doc_sep: str, prefix: str) -> None:
        self.tokenizer = tokenizer
        self.title_sep = title_sep
        self.doc_sep = doc_sep
        self.prefix = prefix

    @property
    def min_combined_length(self) -> int:
        """The special tokens around a context and one token between them."""
        return self.tokenizer.num_special_tokens + 1

    def assemble(
        self,
        parts: Sequence[ContextParts | None],
        *,
        max_combined_length: int,
        truncation: Truncation = Truncation.KEEP_QUESTION,
        prefix: str | None = None,
    ) -> Contexts:
        """Assembles and encodes contexts; None in `parts` gives an empty context, all padding.

        `max_combined_length` counts tokens, special ones included; `prefix` None takes the assembler's own.
        Raises ValueError where max_combined_length leaves no room for a single token.
        """
        if max_combined_length < self.min_combined_length:
            raise ValueError(f"max_combined_length must be at least {self.min_combined_length}")
        present = [part for part in parts if part is not None]
        joined = [self.join(part, self.prefix if prefix is None else prefix) for part in present]
        whole = self.tokenizer.encode_ids([text for text, _ in joined]) if joined else []
        budget = max_combined_length - self.tokenizer.num_special_tokens
        cut = [(ids, False) for ids in whole]
        # Where to cut takes the tokens' places in the text, which few contexts need.
        too_long = [position for position, ids in enumerate(whole) if len(ids) > budget]
        if too_long:
            encodings = self.tokenizer.encode([joined[position][0] for position in too_long])
            for position, encoding in zip(too_long, encodings, strict=True):
                cut[position] = _cut(encoding, joined[position][1], budget, truncation)
        return self._padded([part is not None for part in parts], cut)

    def join(self, part: ContextParts, prefix: str) -> tuple[str, int]:
        """Returns the context as text, and the character at which doc_sep and the question begin."""
        title = part.title.removeprefix('"').removesuffix('"')
        document = prefix + title + self.title_sep + part.text
        joined = (document + self.doc_sep + part.question).replace("  ", " ")
        # Pairs of spaces collapse from the left, so what stands before a place decides how far it moves.
        return joined, len(document.replace("  ", " "))

    def _padded(self, present: Sequence[bool], cut: Sequence[tuple[list[int], bool]]) -> Contexts:
        bos_ids, eos_ids = self.tokenizer.bos_ids, self.tokenizer.eos_ids
        width = max((len(ids) for ids, _ in cut), default=-self.tokenizer.num_special_tokens)
        width += self.tokenizer.num_special_tokens
        input_ids = np.full((len(present), width), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(present), width), dtype=np.int64)
        question_cut = np.zeros(len(present), dtype=np.bool_)
        for position, (ids, is_cut) in zip(np.flatnonzero(present), cut, strict=True):
            framed = bos_ids + ids + eos_ids
            input_ids[position, : len(framed)] = framed
            attention_mask[position, : len(framed)] = 1
            question_cut[position] = is_cut
        return Contexts(input_ids, attention_mask, question_cut)


def _cut(
    encoding: Encoding, question_start: int, budget: int, truncation: Truncation
) -> tuple[list[int], bool]:
    """Returns `budget` ids of a context that has more, and whether part of the question had to go.

    KEEP_QUESTION takes the document's last tokens out; a token across the border counts to the question.
    Where doc_sep and the question alone are too long, they are what stays, cut on the right.
    """
    ids: list[int] = encoding.ids
    if truncation is Truncation.QUESTION_LAST:
        return ids[:budget], True
    ends: npt.NDArray[np.int64] = np.asarray(encoding.offsets, dtype=np.int64)[:, 1]
    behind = np.flatnonzero(ends > question_start)
    tail = ids[int(behind[0]) :] if len(behind) else []
    if len(tail) > budget:
        return tail[:budget], True
    return ids[: budget - len(tail)] + tail, False
