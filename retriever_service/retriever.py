"""Search, fetch, score, assemble: from question_hidden_states to the generator's input."""

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from retriever_service.bounded_cache import BoundedCache
from retriever_service.completer import Completer, Searched
from retriever_service.completions import Completions
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.tokenizer import QuestionTokenizer
from retriever_service.errors import NoQuestionTokenizerError, OverloadedError
from retriever_service.exact_search import exact_search
from retriever_service.index.base import VectorIndex
from retriever_service.metrics import RetrieverMetrics
from retriever_service.niceness import give_way
from retriever_service.recall_sampler import RecallSampler
from retriever_service.search_batcher import SearchBatcher
from retriever_service.selections import Selections
from retriever_service.store.base import DocumentStore
from retriever_service.store.passage_reader import PassageCache, PassageReader
from retriever_service.types import Document, Float32Array, Int64Array, Query, Retrieved, Selection
from retriever_service.work_limit import run_limited

_READING_THREADS = 2


@dataclass(frozen=True, slots=True)
class RetrieverLimits:
    """How much a retriever does at once."""

    batch_window_s: float = 0.001
    max_search_batch: int = 256
    max_queued_questions: int = 4096
    assembly_threads: int = 1
    max_exact_rows: int = 1000
    recall_sample_rate: float = 0.0


class Retriever:
    """Answers from one generation of an index; another generation is another Retriever.

    Make it inside a running event loop. Searching has a thread for each copy of the index, which may use several
    in faiss; what follows runs in a pool of `assembly_threads`, or with the search where a question comes alone.
    Contexts of long documents have a thread of their own, which nobody else waits for.
    Filters, exact searches and documents asked for have threads of their own, for a filter may take seconds.
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
        passage_cache: PassageCache | None = None,
    ) -> None:
        """`passage_cache` may be shared with the retrievers of other generations; none keeps nothing."""
        self.index = index
        self.store = store
        self.assembler = assembler
        self.generation = generation
        self.question_tokenizer = question_tokenizer
        self._limits = limits or RetrieverLimits()
        self._metrics = metrics
        self._search_executor = search_executor or ThreadPoolExecutor(index.parallel_searches, "search")
        self._assembling = ThreadPoolExecutor(self._limits.assembly_threads, "assemble")
        self._assembling_long = ThreadPoolExecutor(1, "assemble-long")
        self._reading = ThreadPoolExecutor(_READING_THREADS, "read")
        self._completer = Completer(
            PassageReader(store, BoundedCache(0) if passage_cache is None else passage_cache),
            assembler,
            metrics,
            generation=generation,
            metric=index.metric,
            question_tokenizer=question_tokenizer,
        )
        self._completions = Completions(
            self._assembling, self._limits.assembly_threads, self._completer.complete
        )
        self._batcher = SearchBatcher(
            index,
            self._search_executor,
            metrics,
            window_s=self._limits.batch_window_s,
            max_batch=self._limits.max_search_batch,
        )
        self._selections = Selections(store, self._reading)
        self._sampling = ThreadPoolExecutor(1, "recall", initializer=give_way)
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
            found, retrieved = await self._search(query, selection)
            if retrieved is None:
                retrieved = await self._completions.run(Searched(query, found))
            if retrieved.contexts is None and not query.skip_contexts:
                retrieved = await run_limited(
                    self._assembling_long, self._completer.assemble, query, retrieved
                )
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

        return await run_limited(self._reading, read)

    async def close(self) -> None:
        """Stops the threads; index and store belong to who opened them."""
        await self._batcher.close()
        # Elsewhere: a sample of the recall may take a second to end, and others are answered meanwhile.
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        self._search_executor.shutdown()
        self._sampling.shutdown(cancel_futures=True)
        self._assembling.shutdown()
        self._assembling_long.shutdown()
        self._reading.shutdown()

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

    async def _search(self, query: Query, selection: Selection | None) -> tuple[Int64Array, Retrieved | None]:
        """Returns candidate rows, and the answer where it came along.

        Rows are the index's, or where few may be found or the kind cannot select, exact ones.
        """
        vectors = query.question_hidden_states
        if selection is not None and (
            len(selection) <= self._limits.max_exact_rows or not self.index.takes_selection
        ):
            exact = functools.partial(self._search_exactly, vectors, query.n_docs, selection)
            return await asyncio.get_running_loop().run_in_executor(self._reading, exact), None
        factor = 1 if self.index.has_exact_scores else query.rescore_factor

        def finish(found: Int64Array) -> Retrieved:
            return self._completer.complete([Searched(query, found)])[0]

        return await self._batcher.search_and_finish(
            vectors, query.n_docs * factor, query.search_parameters, selection, finish
        )

    def _search_exactly(self, vectors: Float32Array, n_docs: int, selection: Selection) -> Int64Array:
        return exact_search(self.store, vectors, n_docs, self.index.metric, self.index.living(selection))
