"""Search, fetch, score, assemble: from question_hidden_states to the generator's input."""

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag_serving.errors import DataLossError, InvalidArgumentError
from retriever_service.completions import Completions
from retriever_service.context.assembler import ContextAssembler, ContextParts
from retriever_service.context.tokenizer import QuestionTokenizer
from retriever_service.errors import NoQuestionTokenizerError, OverloadedError
from retriever_service.exact_search import exact_search
from retriever_service.index.base import VectorIndex
from retriever_service.metrics import RetrieverMetrics
from retriever_service.recall_sampler import RecallSampler
from retriever_service.search_batcher import SearchBatcher
from retriever_service.selections import Selections
from retriever_service.store.base import DocumentStore
from retriever_service.types import (
    Contexts,
    Document,
    Float32Array,
    Int64Array,
    Metric,
    Query,
    Retrieved,
    Selection,
)


@dataclass(frozen=True, slots=True)
class RetrieverLimits:
    """How much a retriever does at once."""

    batch_window_s: float = 0.001
    max_search_batch: int = 256
    max_queued_questions: int = 4096
    assembly_threads: int = 2
    max_exact_rows: int = 1000
    recall_sample_rate: float = 0.0


class Retriever:
    """Answers from one generation of an index; another generation is another Retriever.

    Make it inside a running event loop. Searching has a thread for each copy of the index, which may
    use several in faiss; the rest of a request runs in a pool of `assembly_threads`.
    """

    def __init__(
        self,
        index: VectorIndex,
        store: DocumentStore,
        assembler: ContextAssembler,
        metrics: RetrieverMetrics,
        *,
        generation: int,
        question_tokenizer: QuestionTokenizer | None = None,
        limits: RetrieverLimits | None = None,
        search_executor: ThreadPoolExecutor | None = None,
    ) -> None:
        self.index = index
        self.store = store
        self.assembler = assembler
        self.generation = generation
        self.question_tokenizer = question_tokenizer
        self._limits = limits or RetrieverLimits()
        self._metrics = metrics
        self._search_executor = search_executor or ThreadPoolExecutor(index.parallel_searches, "search")
        self._pool = ThreadPoolExecutor(self._limits.assembly_threads, "assemble")
        self._completions = Completions(self._pool, self._limits.assembly_threads)
        self._batcher = SearchBatcher(
            index,
            self._search_executor,
            metrics,
            window_s=self._limits.batch_window_s,
            max_batch=self._limits.max_search_batch,
        )
        self._selections = Selections(store, self._pool)
        self._sampling = ThreadPoolExecutor(1, "recall")
        self._sampler = RecallSampler(
            index, store, metrics, self._sampling, rate=self._limits.recall_sample_rate
        )
        self._questions_in_flight = 0
        self._mean_latency_s = 0.01

    async def retrieve(self, query: Query) -> Retrieved:
        """Finds and assembles the documents of a batch.

        Raises OverloadedError where too many questions wait, InvalidSearchParametersError for a knob that the
        index lacks, NoQuestionTokenizerError where question_input_ids cannot be decoded, and DataLossError
        where a row of the index has no document.
        """
        self.index.check_parameters(query.search_parameters)
        if (
            query.question_input_ids is not None
            and not query.skip_contexts
            and self.question_tokenizer is None
        ):
            raise NoQuestionTokenizerError(
                "question_input_ids: this retriever has no question tokenizer; give question_texts,"
                " or start it with --question-tokenizer"
            )
        batch = len(query.question_hidden_states)
        self._admit(batch)
        began_s = time.monotonic()
        try:
            selection = None if query.filter is None else await self._selections.of(query.filter)
            found = await self._search(query, selection)
            work = functools.partial(self._complete, query, found)
            retrieved = await self._completions.run(work)
            if query.score_threshold is None:
                vectors = query.question_hidden_states
                self._sampler.offer(vectors, query.n_docs, retrieved.rows, selection)
            self._mean_latency_s += 0.1 * (time.monotonic() - began_s - self._mean_latency_s)
            return retrieved
        finally:
            self._release(batch)

    async def documents(
        self, keys: list[str], rows: list[int]
    ) -> tuple[dict[str, Document], dict[int, Document]]:
        """Reads the documents of these keys and rows; those that do not exist are left out."""

        def read() -> tuple[dict[str, Document], dict[int, Document]]:
            return dict(self.store.documents_by_key(keys)), dict(self.store.documents_by_row(rows))

        return await asyncio.get_running_loop().run_in_executor(self._pool, read)

    async def close(self) -> None:
        """Stops the threads; index and store belong to who opened them."""
        await self._batcher.close()
        self._search_executor.shutdown()
        self._sampling.shutdown(cancel_futures=True)
        self._pool.shutdown()

    def _admit(self, batch: int) -> None:
        if (
            self._questions_in_flight
            and self._questions_in_flight + batch > self._limits.max_queued_questions
        ):
            raise OverloadedError(
                f"{self._questions_in_flight} questions are waiting,"
                f" at most {self._limits.max_queued_questions} may",
                retry_after_s=max(0.05, self._mean_latency_s),
            )
        self._questions_in_flight += batch
        self._metrics.questions_in_flight.set(self._questions_in_flight)

    def _release(self, batch: int) -> None:
        self._questions_in_flight -= batch
        self._metrics.questions_in_flight.set(self._questions_in_flight)

    async def _search(self, query: Query, selection: Selection | None) -> Int64Array:
        """Returns candidate rows: of the index, or where few may be found or the kind cannot select, exact ones."""
        vectors = query.question_hidden_states
        if selection is not None and (
            len(selection) <= self._limits.max_exact_rows or not self.index.takes_selection
        ):
            exact = functools.partial(
                exact_search, self.store, vectors, query.n_docs, self.index.metric, selection.rows
            )
            return await asyncio.get_running_loop().run_in_executor(self._pool, exact)
        factor = 1 if self.index.has_exact_scores else query.rescore_factor
        return await self._batcher.search(vectors, query.n_docs * factor, query.search_parameters, selection)

    def _complete(self, query: Query, found: Int64Array) -> Retrieved:
        """Fetch, score, assemble; runs in a thread."""
        with self._metrics.assemble_seconds.time():
            rows, doc_scores, doc_embeds = self._score(query, found)
            documents = self._fetch(rows)
            n_docs_found = [int(count) for count in (rows >= 0).sum(axis=1)]
            contexts = None if query.skip_contexts else self._assemble(query, documents)
        for count in n_docs_found:
            self._metrics.docs_found.observe(count)
        return Retrieved(doc_scores, rows, doc_embeds, documents, n_docs_found, contexts, self.generation)

    def _score(self, query: Query, found: Int64Array) -> tuple[Int64Array, Float32Array, Float32Array]:
        """Returns rows, exact doc_scores and doc_embeds, best first, trimmed to the most hits of a question.

        Products are summed in float64 and rounded once: a score depends neither on the batch it came in nor
        on the index's kind. Equal scores stand in row order. Of more candidates than n_docs, the nearest by
        the index's metric are kept; those below the threshold are not.
        """
        present = np.unique(found[found >= 0])
        stored = self.store.embeddings_of(present.tolist())
        questions = query.question_hidden_states
        doc_embeds = np.zeros(
            (*found.shape, questions.shape[1]), dtype=np.float32
        )  # [batch, candidates, dim]
        doc_embeds[found >= 0] = stored[np.searchsorted(present, found[found >= 0])]
        exact = np.einsum("bd,bnd->bn", questions, doc_embeds, dtype=np.float64)
        with np.errstate(over="ignore"):
            doc_scores = np.where(found >= 0, exact, -np.inf).astype(np.float32)
        if not np.isfinite(doc_scores[found >= 0]).all():
            raise InvalidArgumentError("question_hidden_states", "too large: a doc_score overflows float32")
        kept = _nearest(found, exact, doc_embeds, query.n_docs, self.index.metric)
        if query.score_threshold is not None:
            kept &= doc_scores >= query.score_threshold
        found, doc_scores = np.where(kept, found, -1), np.where(kept, doc_scores, np.float32(-np.inf))
        order = np.lexsort((found, -doc_scores), axis=1)
        order = order[:, : int(kept.sum(axis=1).max(initial=0))]
        rows = np.take_along_axis(found, order, axis=1)
        doc_embeds = np.take_along_axis(doc_embeds, order[:, :, None], axis=1)
        doc_embeds[rows < 0] = 0
        return rows, np.take_along_axis(doc_scores, order, axis=1), doc_embeds

    def _fetch(self, rows: Int64Array) -> list[list[Document | None]]:
        wanted = rows[rows >= 0].tolist()
        read = self.store.documents_by_row(wanted, replaced=True)
        missing = set(wanted) - set(read)
        if missing:
            raise DataLossError(f"the index names row {min(missing)}, which the store does not have")
        return [[read.get(row) for row in row_of_question] for row_of_question in rows.tolist()]

    def _assemble(self, query: Query, documents: list[list[Document | None]]) -> Contexts:
        questions = self._questions(query)
        parts = [
            None if document is None else ContextParts(document.title, document.text, question)
            for question, found in zip(questions, documents, strict=True)
            for document in found
        ]
        contexts = self.assembler.assemble(
            parts,
            max_combined_length=query.max_combined_length,
            truncation=query.truncation,
            prefix=query.prefix,
        )
        cut = contexts.question_cut.reshape(len(documents), -1).any(axis=1)
        self._metrics.questions_cut_total.inc(int(cut.sum()))
        return contexts

    def _questions(self, query: Query) -> list[str]:
        if query.question_texts is not None:
            return list(query.question_texts)
        if query.question_input_ids is not None and self.question_tokenizer is not None:
            return self.question_tokenizer.decode(query.question_input_ids)
        raise ValueError("a query with contexts needs its questions")


def _nearest(
    found: Int64Array,
    products: npt.NDArray[np.float64],
    doc_embeds: Float32Array,
    n_docs: int,
    metric: Metric,
) -> npt.NDArray[np.bool_]:
    """Returns which of found [batch, candidates] are real and among the n_docs nearest; ties go to lower rows."""
    kept = found >= 0
    if found.shape[1] <= n_docs:
        return kept
    nearness = products
    if metric is Metric.L2:  # less the question's own square, the same for all its candidates
        nearness = 2 * products - np.square(doc_embeds, dtype=np.float64).sum(axis=2)
    order = np.lexsort((found, np.where(kept, -nearness, np.inf)), axis=1)
    best = np.zeros_like(kept)
    np.put_along_axis(best, order[:, :n_docs], True, axis=1)
    return kept & best
