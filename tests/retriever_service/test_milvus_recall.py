"""Live recall on Milvus: from exact searches in parts of the documents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.types import Selection
from tests.retriever_service.milvus_server import MilvusServer, import_folder, library
from tests.retriever_service.test_corpus import DOCUMENTS, delete, upsert, vector
from tests.retriever_service.test_recall import EachInTurn
from tests.retriever_service.tiny_models import embeddings_of

EMBEDDINGS = embeddings_of(DOCUMENTS)


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
