"""Retrieval is Hugging Face's: RagRetriever over a datasets folder and its faiss file, beside ours."""

import asyncio
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from transformers import RagRetriever

from rag_serving.metrics import Metrics
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.tokenizer import ContextTokenizer, QuestionTokenizer
from retriever_service.index.faiss_index import FaissIndex
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.reader import CorpusReader
from retriever_service.metrics import RetrieverMetrics
from retriever_service.retriever import Retriever
from retriever_service.store.sqlite import SqliteStore
from retriever_service.types import Metric, Query, Retrieved, Truncation
from tests.retriever_service.tiny_models import (
    bpe_tokenizer,
    make_documents,
    tiny_config,
    wordpiece_tokenizer,
)

DIM = 16
QUESTIONS = ["Who ruled the old  KING ?", "where is the lake", "which moon is small", "the bridge"]
VECTORS = np.random.default_rng(5).standard_normal((len(QUESTIONS), DIM)).astype(np.float32)
FAISS_METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("passages") / "dataset"
    documents = make_documents(80, DIM, seed=3)
    Dataset.from_dict(
        {
            "title": [document["title"] for document in documents],
            "text": [document["text"] for document in documents],
            "embeddings": [document["embedding"] for document in documents],
        }
    ).save_to_disk(folder)
    return folder


@pytest.fixture(
    scope="module", params=[("Flat", "inner_product"), ("Flat", "l2"), ("HNSW8", "inner_product")]
)
def faiss_file(request: pytest.FixtureRequest, dataset_folder: Path) -> Path:
    from datasets import load_from_disk

    kind, metric = request.param
    dataset = load_from_disk(str(dataset_folder))
    index = faiss.index_factory(DIM, kind, FAISS_METRICS[metric])
    dataset.add_faiss_index("embeddings", custom_index=index)
    file = dataset_folder.parent / f"{kind}-{metric}.faiss"
    dataset.get_index("embeddings").save(str(file))
    return file


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    return wordpiece_tokenizer(), bpe_tokenizer()


def hugging_face(dataset_folder: Path, faiss_file: Path, tokenizers: Any, n_docs: int) -> Any:
    config = tiny_config(
        index_name="custom",
        passages_path=str(dataset_folder),
        index_path=str(faiss_file),
        retrieval_vector_size=DIM,
        n_docs=n_docs,
        max_combined_length=30,
    )
    question_tokenizer, generator_tokenizer = tokenizers
    retriever = RagRetriever(config, question_tokenizer, generator_tokenizer)
    input_ids = question_tokenizer(QUESTIONS, padding=True)["input_ids"]
    return input_ids, retriever(input_ids, VECTORS, n_docs=n_docs, return_tensors="np")


def ours(
    dataset_folder: Path, folder: Path, tokenizers: Any, input_ids: Any, n_docs: int, **options: Any
) -> Retrieved:
    snapshot = build_index(
        CorpusReader(dataset_folder),
        folder,
        encoder=None,
        embedding_name="tiny",
        options=BuildOptions(**options),
        progress=lambda stage, done, total: None,
    )
    question_tokenizer, generator_tokenizer = tokenizers
    query = Query(
        question_hidden_states=VECTORS,
        n_docs=n_docs,
        max_combined_length=30,
        question_input_ids=np.asarray(input_ids),
        truncation=Truncation.QUESTION_LAST,
    )

    async def retrieve() -> Retrieved:
        retriever = Retriever(
            FaissIndex.load(snapshot.index_file),
            SqliteStore(snapshot.documents_file, DIM),
            ContextAssembler(
                ContextTokenizer(generator_tokenizer), title_sep=" / ", doc_sep=" // ", prefix=""
            ),
            RetrieverMetrics(Metrics("retriever")),
            generation=snapshot.manifest.generation,
            question_tokenizer=QuestionTokenizer(question_tokenizer),
        )
        try:
            return await retriever.retrieve(query)
        finally:
            await retriever.close()

    return asyncio.run(retrieve())


def assert_same(retrieved: Retrieved, expected: Any, n_docs: int) -> None:
    embeds = expected["retrieved_doc_embeds"]
    scores = np.einsum("bd,bnd->bn", VECTORS, embeds)
    # An L2 index names documents nearest first; doc_scores, and so our order, are inner products.
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(retrieved.rows, np.take_along_axis(expected["doc_ids"], order, 1))
    np.testing.assert_allclose(retrieved.doc_scores, np.take_along_axis(scores, order, 1), atol=1e-5)
    np.testing.assert_array_equal(
        retrieved.doc_embeds, np.take_along_axis(embeds, order[:, :, None], 1).astype(np.float32)
    )
    contexts = retrieved.contexts
    assert contexts is not None
    flat = (order + np.arange(len(order))[:, None] * n_docs).reshape(-1)
    width = contexts.input_ids.shape[1]
    np.testing.assert_array_equal(contexts.input_ids, expected["context_input_ids"][flat][:, :width])
    np.testing.assert_array_equal(
        contexts.attention_mask, expected["context_attention_mask"][flat][:, :width]
    )
    assert expected["context_attention_mask"][:, width:].sum() == 0


@pytest.mark.parametrize("n_docs", [1, 5])
def test_retriever_over_the_same_faiss_file_gives_what_rag_retriever_gives(
    dataset_folder: Path, faiss_file: Path, tokenizers: Any, tmp_path: Path, n_docs: int
) -> None:
    input_ids, expected = hugging_face(dataset_folder, faiss_file, tokenizers, n_docs)
    retrieved = ours(dataset_folder, tmp_path / "index", tokenizers, input_ids, n_docs, faiss_file=faiss_file)
    assert_same(retrieved, expected, n_docs)


def test_flat_index_built_from_the_folder_gives_what_rag_retriever_gives(
    dataset_folder: Path, tokenizers: Any, tmp_path: Path
) -> None:
    from datasets import load_from_disk

    dataset = load_from_disk(str(dataset_folder))
    dataset.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    dataset.get_index("embeddings").save(str(tmp_path / "flat.faiss"))
    input_ids, expected = hugging_face(dataset_folder, tmp_path / "flat.faiss", tokenizers, 4)
    retrieved = ours(
        dataset_folder, tmp_path / "index", tokenizers, input_ids, 4, metric=Metric.INNER_PRODUCT
    )
    np.testing.assert_array_equal(retrieved.rows, expected["doc_ids"])
    assert_same(retrieved, expected, 4)
