"""A process that changes a corpus in Milvus is killed at random moments: a change is there wholly, or not at all."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retriever_service.exact_search import exact_search
from retriever_service.types import SearchParameters
from tests.retriever_service.changing_milvus import LEASE_S, make, vector
from tests.retriever_service.milvus_server import MilvusServer, library
from tests.retriever_service.test_corpus import DOCUMENTS, keys_of

KILLS = 6


def after(contents: dict[str, str], change: dict[str, Any]) -> dict[str, str]:
    if "deleted" in change:
        return {key: text for key, text in contents.items() if key not in change["deleted"]}
    return contents | change["written"]


def killed(milvus: MilvusServer, name: str, seed: int) -> tuple[list[dict[str, Any]], bool]:
    """Returns the changes that a process began before it was killed, and whether the last was acknowledged."""
    command = [sys.executable, "-m", "tests.retriever_service.changing_milvus", milvus.uri, name, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.0, 0.4))
        process.kill()
        said = [first, *process.stdout]
    # A line that was cut short says nothing: what it would have begun was not begun.
    whole = [line.strip() for line in said if line.endswith("\n")]
    begun = [json.loads(line) for line in whole if line != "acknowledged"]
    assert begun
    return begun, whole[-1] == "acknowledged"


def test_changes_of_a_killed_writer_are_there_wholly_or_not_at_all(
    milvus: MilvusServer, tmp_path: Path, corpus: Path, build_corpus: Callable[..., Any], imported: Any
) -> None:
    build_corpus(corpus, tmp_path / "index")
    name = imported(tmp_path / "index")
    contents = {document["key"]: document["text"] for document in DOCUMENTS}
    num_begun = 0
    for seed in range(KILLS):
        begun, acknowledged = killed(milvus, name, seed)
        num_begun += len(begun)
        for change in begun[:-1]:
            contents = after(contents, change)
        possible = [after(contents, begun[-1])] if acknowledged else [contents, after(contents, begun[-1])]
        with library(milvus.uri, name, lease_s=LEASE_S) as shelf:
            live = shelf.active()
            try:
                assert live.read_only_reason is None
                store, index = live.generation.store, live.generation.index
                found = {key: one.text for key, one in store.documents_by_key(keys_of(live)).items()}
                assert found in possible
                assert index.ntotal == len(found) == len(store.rows())
                # The last change again, as a client would that was not answered: it is made once.
                make(live, begun[-1], f"{seed} {len(begun) - 1}")
                contents = after(contents, begun[-1])
                assert keys_of(live) == sorted(contents)
                for key in [key for key in contents if key.startswith("k")]:
                    document = store.documents_by_key([key])[key]
                    assert document.text == contents[key]
                    question = vector(contents[key])[None]
                    np.testing.assert_array_equal(store.embeddings_of([document.row]), question)
                    rows, _ = index.search(question, 5, SearchParameters())
                    best = exact_search(store, question, 5, index.metric, store.rows())
                    np.testing.assert_array_equal(rows, best)
            finally:
                live.close()
    assert num_begun > KILLS, "no process lived long enough to acknowledge a change"
