"""Hugging Face's RagRetriever over the same vectors: a datasets folder and the index's own faiss file."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import AutoTokenizer, BartConfig, DPRConfig, RagConfig, RagRetriever

from bench.retriever.workload import CHECKPOINT, N_DOCS, Corpus, Floats, passages

_MAX_COMBINED_LENGTH = 300


def retriever(corpus: Corpus, index_folder: Path, folder: Path) -> Any:
    """A RagRetriever in its "custom" layout, on the faiss file that rag-retriever serves."""
    place = folder / f"{corpus.path}-datasets"
    if not (place / "state.json").exists():
        _dataset(corpus).save_to_disk(place)
    generation = (index_folder / "CURRENT").read_text(encoding="ascii").split()[0]
    config = RagConfig(
        question_encoder=DPRConfig().to_dict(),
        generator=BartConfig().to_dict(),
        index_name="custom",
        passages_path=str(place),
        index_path=str(index_folder / generation / "index.faiss"),
        retrieval_vector_size=corpus.dim,
        n_docs=N_DOCS,
        max_combined_length=_MAX_COMBINED_LENGTH,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    made: Any = RagRetriever(config, tokenizer, tokenizer)
    made.init_retrieval()
    return made


def searches_per_s(
    retriever: Any, questions: Floats, texts: list[str], *, clients: int, seconds: float, size: int = 1
) -> float:
    """Each client is a thread that asks `size` questions, waits and asks again, as around a generator in one process.

    One lock around the call: the tokenizers of RagRetriever set truncation and padding on a backend that they
    share, which fails when two threads do it at once.
    """
    starts = range(0, len(texts) - size + 1, size)
    ids = [retriever.question_encoder_tokenizer(texts[start : start + size])["input_ids"] for start in starts]
    lock, ends_s = threading.Lock(), time.monotonic() + seconds
    answered = [0] * clients

    def client(number: int) -> None:
        position = number
        while time.monotonic() < ends_s:
            with lock:
                start = starts[position % len(ids)]
                retriever(ids[position % len(ids)], questions[start : start + size], return_tensors="np")
            answered[number] += size
            position += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered) / (time.monotonic() - began_s)


def _dataset(corpus: Corpus) -> Dataset:
    vectors = np.vstack([corpus.vectors(start) for start in range(0, corpus.size, 10_000)])
    offsets = np.arange(0, vectors.size + 1, corpus.dim, dtype=np.int32)
    texts = passages()
    chosen = [texts[row % len(texts)] for row in range(corpus.size)]
    columns = {
        "title": [title for title, _ in chosen],
        "text": [text for _, text in chosen],
        "embeddings": pa.ListArray.from_arrays(offsets, vectors.ravel()),
    }
    return Dataset(pa.table(columns))
