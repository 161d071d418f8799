"""A process that changes a corpus in Milvus until it is killed: it says what it begins, and what was acknowledged."""

import json
import random
import sys
from typing import Any

import numpy as np

from retriever_service.corpus.base import Corpus, Delete, NewDocument, Upsert
from tests.retriever_service.milvus_server import library

DIM = 16
KEYS = [f"k{place}" for place in range(20)]
LEASE_S = 0.4


def vector(text: str) -> Any:
    """The embedding of a text, far from every other's."""
    return np.random.default_rng(list(text.encode())).standard_normal(DIM).astype(np.float32)


def planned(seed: int, step: int) -> dict[str, Any]:
    """A change: new texts by key, or keys to delete."""
    choice = random.Random(f"{seed} {step}")
    keys = choice.sample(KEYS, choice.randint(1, 6))
    if choice.random() < 0.3:
        return {"deleted": keys}
    return {"written": {key: f"{key} of {seed}, {step}" for key in keys}}


def make(corpus: Corpus, change: dict[str, Any], request_id: str) -> None:
    if "deleted" in change:
        corpus.delete(Delete(request_id, "d", [(key, "") for key in change["deleted"]]))
        return
    written = change["written"]
    documents = [NewDocument(key, "", text) for key, text in written.items()]
    vectors = np.stack([vector(text) for text in written.values()])
    embedding = corpus.generation.manifest.embedding
    corpus.upsert(Upsert(request_id, "d", documents, vectors, False, embedding))


def main(uri: str, name: str, seed: int) -> None:
    with library(uri, name, lease_s=LEASE_S) as shelf:
        corpus = shelf.active()
        corpus._grace_s = 0.05
        step = 0
        while True:
            change = planned(seed, step)
            print(json.dumps(change), flush=True)
            make(corpus, change, f"{seed} {step}")
            print("acknowledged", flush=True)
            if step % 5 == 4:
                corpus.follow()
            step += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
