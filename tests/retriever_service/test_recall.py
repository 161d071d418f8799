"""Live recall from exact searches in parts of the documents."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.metrics import Metrics
from retriever_service import recall, recall_sampler
from retriever_service.corpus.local import LocalCorpus
from retriever_service.metrics import RetrieverMetrics
from retriever_service.recall import random_part, recall_in_part
from retriever_service.recall_sampler import RecallSampler
from retriever_service.types import Metric, Selection
from tests.retriever_service.test_corpus import DOCUMENTS, delete, upsert, vector
from tests.retriever_service.tiny_models import embeddings_of

EMBEDDINGS = embeddings_of(DOCUMENTS)


class EachInTurn(random.Random):
    """Draws every number once, from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self._next = -1

    def randrange(self, stop: int, *_: Any) -> int:  # type: ignore[override]
        self._next = (self._next + 1) % stop
        return self._next


@pytest.mark.parametrize(("next_row", "size"), [(1, 0), (2, 1), (33, 2), (160, 10), (100, 100), (9, 50)])
def test_every_row_is_in_as_many_parts_as_every_other(next_row: int, size: int) -> None:
    chance = EachInTurn()
    counts = np.zeros(next_row, np.int64)
    for _ in range(next_row):
        for some in random_part(next_row, size, chance):
            counts[list(some)] += 1
    assert set(counts.tolist()) == {max(1, min(size, next_row))}


@pytest.mark.parametrize("metric", list(Metric))
def test_parts_of_all_documents_together_give_the_recall(metric: Metric) -> None:
    """Three of the ten nearest were missed, and those behind them found in their place."""
    chance = np.random.default_rng(3)
    documents = chance.standard_normal((200, 8)).astype(np.float32)
    question = chance.standard_normal((1, 8)).astype(np.float32)
    scores = recall.similarities(question, documents, metric)[0]
    nearest = np.argsort(-scores)
    answer = [*nearest[:5], *nearest[8:13]]
    by_row = {row: documents[row] for row in range(200)}
    samples = [
        recall_in_part(question, 10, {row: by_row[row] for row in answer}, {row: by_row[row]}, metric)
        for row in range(200)
    ]
    assert samples.count(None) == 187
    assert np.mean([one for one in samples if one is not None]) == pytest.approx(10 / 13)
    few = {row: by_row[row] for row in answer[:9]}
    assert recall_in_part(question, 10, few, {nearest[-1]: by_row[nearest[-1]]}, metric) == 0.0
    assert recall_in_part(question, 10, few, {}, metric) is None


def test_a_large_corpus_is_compared_in_parts_of_what_an_answer_may_hold(
    tmp_path: Path, corpus: Path, build_corpus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall_sampler, "_MOST_ROWS", 20)
    build_corpus(corpus, tmp_path / "index", kind="HNSW8")
    live = LocalCorpus(tmp_path / "index")
    store, index = live.generation.store, live.generation.index
    asked: list[int] = []
    embeddings = store.embeddings_of
    monkeypatch.setattr(store, "embeddings_of", lambda rows: (asked.append(len(rows)), embeddings(rows))[1])
    question = vector(3)[None]
    nearest = np.argsort(-(question @ EMBEDDINGS.T)[0])

    def samples(rows: Any, selection: Selection | None = None) -> list[float]:
        """One from each place where a part may begin."""
        metrics = RetrieverMetrics(Metrics("retriever"))
        taken: list[float] = []
        monkeypatch.setattr(metrics.live_recall_ratio, "observe", taken.append)
        with ThreadPoolExecutor(1) as pool:
            sampler = RecallSampler(index, store, metrics, pool, rate=1.0)
            chance = EachInTurn()
            sampler._random = chance
            chance.random = lambda: 0.0  # type: ignore[method-assign]
            for _ in range(store.next_row):
                sampler._rests_until_s = 0.0
                sampler.offer(question, 5, np.asarray(rows)[None], selection)
                assert sampler._running is not None
                sampler._running.result()
        return taken

    assert set(samples(nearest[:5])) == {1.0}
    assert max(asked) <= 20, "a sample reads a part"
    some_missed = samples([*nearest[:3], *nearest[4:6]])
    assert min(some_missed) < 1.0
    assert np.mean(some_missed) == pytest.approx(5 / 6, abs=0.1)
    selection = Selection(np.asarray(sorted(row for row in nearest if row % 3 == 0)))
    meeting = [row for row in nearest if row % 3 == 0]
    assert set(samples(meeting[:5], selection)) == {1.0}
    upsert(live, "nearest of all", seed=3)
    assert store.next_row == len(DOCUMENTS) + 1
    assert min(samples(nearest[:5])) < 1.0
    victim = int(nearest[4])
    delete(live, DOCUMENTS[victim]["key"])
    assert samples(nearest[:5]) == [], "its document is gone since: no fault of the search"
    everything = [row for row in range(len(DOCUMENTS) + 1) if row != victim]
    assert store.rows_between(0, store.next_row).tolist() == everything == store.rows().tolist()
    around = range(victim - 2, victim + 2)
    assert store.rows_between(around.start, around.stop).tolist() == [r for r in around if r in everything]
    assert store.rows_between(len(DOCUMENTS), 10_000).tolist() == [len(DOCUMENTS)]
    live.close()
