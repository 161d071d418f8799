"""What follows a search: fetch, score, assemble, for many requests at once."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.encoder import ContextParts
from retriever_service.context.tokenizer import QuestionTokenizer
from retriever_service.metrics import RetrieverMetrics
from retriever_service.scoring import Scored, score
from retriever_service.store.passage_reader import Passage, PassageReader
from retriever_service.types import Contexts, Document, Float32Array, Int64Array, Metric, Query, Retrieved

_OneT = TypeVar("_OneT")
_LONG_CHARACTERS = 1 << 14
"""Of a document: some thousand tokens, and a hundredth of a second for them."""


@dataclass(frozen=True, slots=True)
class Searched:
    """A query and its candidate rows int64 [batch, candidates], -1 where there is none."""

    query: Query
    found: Int64Array


class Completer:
    """Completes answers from one generation; safe to call from several threads.

    The requests of a call share one read of the store, one scoring and one encoding wherever they ask for the
    same: each alone costs as many calls as all together.
    """

    def __init__(
        self,
        passages: PassageReader,
        assembler: ContextAssembler,
        metrics: RetrieverMetrics,
        *,
        generation: int,
        metric: Metric,
        question_tokenizer: QuestionTokenizer | None,
    ) -> None:
        self._passages = passages
        self._assembler = assembler
        self._metrics = metrics
        self._generation = generation
        self._metric = metric
        self._question_tokenizer = question_tokenizer

    def complete(self, batch: Sequence[Searched]) -> list[Retrieved]:
        """Returns the answer of each; raises what any of them alone would raise.

        That is DataLossError where a row of the index has no document, and InvalidArgumentError where a
        doc_score overflows. An answer with a long document gets its contexts from `assemble`, not here: others
        wait behind this.
        """
        with self._metrics.assemble_seconds.time():
            present = np.unique(np.concatenate([one.found.ravel() for one in batch]))
            present = present[present >= 0]
            read = self._passages.read(present.tolist())
            scored = self._score(batch, present, read)
            by_row: dict[int, Document | None] = dict(
                zip(present.tolist(), (passage.document for passage in read), strict=True)
            )
            documents = [[[by_row.get(row) for row in rows] for rows in one.rows.tolist()] for one in scored]
            long = {row for row, document in by_row.items() if document is not None and _is_long(document)}
            wanted = [
                not one.query.skip_contexts and (not long or long.isdisjoint(found.rows.flat))
                for one, found in zip(batch, scored, strict=True)
            ]
            contexts = self._assemble([one.query for one in batch], documents, wanted)
        return [
            self._retrieved(one, found, assembled)
            for one, found, assembled in zip(scored, documents, contexts, strict=True)
        ]

    def assemble(self, query: Query, retrieved: Retrieved) -> Retrieved:
        """Returns the answer to a query with the contexts that `complete` left out."""
        with self._metrics.assemble_seconds.time():
            documents = [list(found) for found in retrieved.documents]
            [contexts] = self._assemble([query], [documents], [True])
        return replace(retrieved, contexts=contexts)

    def _retrieved(
        self, scored: Scored, documents: list[list[Document | None]], contexts: Contexts | None
    ) -> Retrieved:
        n_docs_found = (scored.rows >= 0).sum(axis=1).tolist()
        for count in n_docs_found:
            self._metrics.docs_found.observe(count)
        return Retrieved(
            scored.doc_scores,
            scored.rows,
            scored.doc_embeds,
            documents,
            n_docs_found,
            contexts,
            self._generation,
        )

    def _score(self, batch: Sequence[Searched], present: Int64Array, read: Sequence[Passage]) -> list[Scored]:
        stored = np.asarray([passage.embedding for passage in read], dtype=np.float32)
        scored: dict[int, Scored] = {}
        alike = _alike(batch, lambda one: (one.found.shape[1], one.query.n_docs, one.query.score_threshold))
        for places in alike:
            found = np.concatenate([batch[place].found for place in places])
            questions = np.concatenate([batch[place].query.question_hidden_states for place in places])
            query = batch[places[0]].query
            whole = score(
                questions,
                found,
                _embeds_of(found, present, stored, questions.shape[1]),
                query.n_docs,
                self._metric,
                query.score_threshold,
            )
            start = 0
            for place in places:
                stop = start + len(batch[place].found)
                scored[place] = whole.of(start, stop)
                start = stop
        return [scored[place] for place in range(len(batch))]

    def _assemble(
        self,
        queries: Sequence[Query],
        documents: Sequence[list[list[Document | None]]],
        wanted: Sequence[bool],
    ) -> list[Contexts | None]:
        assembled: list[Contexts | None] = [None] * len(queries)
        chosen = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        alike = _alike(
            [queries[place] for place in chosen],
            lambda query: (query.max_combined_length, query.truncation, query.prefix),
        )
        for group in alike:
            places = [chosen[number] for number in group]
            query = queries[places[0]]
            contexts = self._assembler.assemble_batch(
                [self._parts(queries[place], documents[place]) for place in places],
                max_combined_length=query.max_combined_length,
                truncation=query.truncation,
                prefix=query.prefix,
            )
            for place, one in zip(places, contexts, strict=True):
                assembled[place] = one
                cut = one.question_cut.reshape(len(documents[place]), -1).any(axis=1)
                self._metrics.questions_cut_total.inc(int(cut.sum()))
        return assembled

    def _parts(self, query: Query, documents: list[list[Document | None]]) -> list[ContextParts | None]:
        return [
            None if document is None else ContextParts(document.title, document.text, question)
            for question, found in zip(self._questions(query), documents, strict=True)
            for document in found
        ]

    def _questions(self, query: Query) -> list[str]:
        if query.question_texts is not None:
            return list(query.question_texts)
        if query.question_input_ids is not None and self._question_tokenizer is not None:
            return self._question_tokenizer.decode(query.question_input_ids)
        raise ValueError("a query with contexts needs its questions")


def _is_long(document: Document) -> bool:
    return len(document.text) + len(document.title) > _LONG_CHARACTERS


def _alike(batch: Sequence[_OneT], key: Callable[[_OneT], Hashable]) -> list[list[int]]:
    """Returns the places of those with the same key, together."""
    places: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, one in enumerate(batch):
        places[key(one)].append(place)
    return list(places.values())


def _embeds_of(found: Int64Array, present: Int64Array, stored: Float32Array, dim: int) -> Float32Array:
    """Returns the embeddings float32 [batch, candidates, dim] of found, 0 where there is none."""
    if not len(present):
        return np.zeros((*found.shape, dim), dtype=np.float32)
    doc_embeds: Float32Array = stored[np.searchsorted(present, np.maximum(found, present[0]))]
    doc_embeds[found < 0] = 0
    return doc_embeds
