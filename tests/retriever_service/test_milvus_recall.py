"""Live recall on Milvus: from exact searches in parts of the documents."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.milvus import recall
from retriever_service.milvus.recall import random_part, recall_in_part
from retriever_service.types import Metric, Selection
from tests.retriever_service.milvus_server import MilvusServer, import_folder, library
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


@pytest.mark.parametrize("next_row", [1, 2, 33, 160, 1000])
def test_every_row_is_in_as_many_parts_as_every_other(next_row: int) -> None:
    chance = EachInTurn()
    counts = np.zeros(next_row, np.int64)
    for _ in range(next_row):
        condition = random_part(next_row, chance)
        counts += [bool(eval(condition, {"row": row})) for row in range(next_row)]
    assert set(counts.tolist()) == {max(1, next_row // 16)}


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


def test_milvus_is_searched_in_parts_of_what_an_answer_may_hold(
    milvus: MilvusServer, tmp_path: Path, corpus: Path, build_corpus: Callable[..., Any]
) -> None:
    build_corpus(corpus, tmp_path / "index", kind="HNSW8")
    import_folder(milvus.uri, "recalled", tmp_path / "index")
    with library(milvus.uri, "recalled") as shelf:
        live = shelf.active()
        index: Any = live.generation.index
        question = vector(3)[None]
        nearest = np.argsort(-(question @ EMBEDDINGS.T)[0])
        answer = np.asarray([*nearest[:3], *nearest[4:6], -1])

        def samples(rows: Any, n_docs: int, selection: Any = None) -> list[float]:
            index._chance = EachInTurn()
            taken = [index.measured_recall(question, n_docs, rows, selection) for _ in range(60)]
            return [one for one in taken if one is not None]

        assert set(samples(nearest[:5], 5)) == {1.0}
        assert min(samples(answer, 5)) < 1.0
        meeting = [row for row in nearest if row % 3 == 0]
        selection = Selection(np.asarray(sorted(meeting)))
        assert set(samples(np.asarray(meeting), len(meeting), selection)) == {1.0}
        upsert(live, "nearest of all", seed=3)
        assert min(samples(nearest[:5], 5)) < 1.0
        delete(live, DOCUMENTS[nearest[4]]["key"])
        assert samples(nearest[:5], 5) == [], "its document is gone since: no fault of the search"
        live.close()
