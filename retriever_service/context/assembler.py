"""Question and document become one context: Hugging Face's RagRetriever.postprocess_docs, and a kinder cut.

Source: transformers 5.23, models/rag/retrieval_rag.py. What differs on purpose: contexts are padded to the
longest of the response, not to max_combined_length; and Truncation.KEEP_QUESTION cuts the document where
Hugging Face cuts the question, which stands last.
"""

from collections.abc import Sequence

import numpy as np

from retriever_service.context.encoder import ContextEncoder, ContextParts, EncodedContext
from retriever_service.context.tokenizer import ContextTokenizer
from retriever_service.types import Contexts, Int64Array, Truncation


class ContextAssembler:
    """Puts contexts together: prefix + title + title_sep + text + doc_sep + question."""

    def __init__(
        self, tokenizer: ContextTokenizer, *, title_sep: str, doc_sep: str, prefix: str, cache_bytes: int = 0
    ) -> None:
        """`cache_bytes` bounds what is kept of documents that were tokenized."""
        self.tokenizer = tokenizer
        self.title_sep = title_sep
        self.doc_sep = doc_sep
        self.prefix = prefix
        self._encoder = ContextEncoder(tokenizer, title_sep, doc_sep, cache_bytes)

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
        return self.assemble_batch(
            [parts], max_combined_length=max_combined_length, truncation=truncation, prefix=prefix
        )[0]

    def assemble_batch(
        self,
        batch: Sequence[Sequence[ContextParts | None]],
        *,
        max_combined_length: int,
        truncation: Truncation,
        prefix: str | None,
    ) -> list[Contexts]:
        """Assembles the contexts of several responses, each as wide as its own longest: see `assemble`."""
        if max_combined_length < self.min_combined_length:
            raise ValueError(f"max_combined_length must be at least {self.min_combined_length}")
        present = [part for parts in batch for part in parts if part is not None]
        budget = max_combined_length - self.tokenizer.num_special_tokens
        encoded = self._encoder.encode(present, self.prefix if prefix is None else prefix, budget)
        fitted = iter(self._fitted(encoded, budget, truncation))
        return [self._padded([None if part is None else next(fitted) for part in parts]) for parts in batch]

    def _fitted(
        self, encoded: Sequence[EncodedContext], budget: int, truncation: Truncation
    ) -> list[tuple[Int64Array, bool]]:
        """Returns at most `budget` ids of each context, and whether part of the question had to go.

        KEEP_QUESTION takes the document's last tokens out; a token across the border counts to the question.
        Where doc_sep and the question alone are too long, they are what stays, cut on the right.
        """
        fitted = [(context.ids[:budget], len(context.ids) > budget) for context in encoded]
        if truncation is Truncation.QUESTION_LAST:
            return fitted
        too_long = [position for position, (_, is_cut) in enumerate(fitted) if is_cut]
        starts = self._encoder.question_starts([encoded[position] for position in too_long])
        for position, start in zip(too_long, starts, strict=True):
            ids = encoded[position].ids
            tail = ids[start:]
            if len(tail) > budget:
                fitted[position] = tail[:budget], True
            else:
                fitted[position] = np.concatenate((ids[: budget - len(tail)], tail)), False
        return fitted

    def _padded(self, contexts: Sequence[tuple[Int64Array, bool] | None]) -> Contexts:
        num_bos, num_special = len(self.tokenizer.bos_ids), self.tokenizer.num_special_tokens
        lengths = np.asarray(
            [0 if one is None else len(one[0]) + num_special for one in contexts], dtype=np.int64
        )
        shape = len(contexts), int(lengths.max(initial=0))
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        for row, length, one in zip(input_ids, lengths.tolist(), contexts, strict=True):
            if one is not None:
                row[:num_bos] = self.tokenizer.bos_ids
                row[num_bos : num_bos + len(one[0])] = one[0]
                row[num_bos + len(one[0]) : length] = self.tokenizer.eos_ids
        attention_mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        question_cut = np.asarray([one is not None and one[1] for one in contexts], dtype=np.bool_)
        return Contexts(input_ids, attention_mask, question_cut)
