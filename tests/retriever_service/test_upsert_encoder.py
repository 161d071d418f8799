"""Documents that come without embeddings, over the wire: the retriever's passage encoder makes them."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag_serving.errors import StartupError
from rag_serving.rich_status import from_rpc_error
from retriever_service.errors import BuildError
from retriever_service.ingest.build import BuildOptions, build_index
from retriever_service.ingest.embed import PassageEncoder, Pooling
from retriever_service.ingest.reader import CorpusReader
from tests.retriever_service.servicer_calls import array, tensor, violated_fields
from tests.retriever_service.test_corpus_servicer import until_refused
from tests.retriever_service.tiny_models import WORDS, write_jsonl

Serve = Callable[..., contextlib.AbstractAsyncContextManager[Any]]
LINES = [
    {"key": f"doc-{row}", "title": WORDS[row], "text": " ".join(WORDS[row : row + 9])} for row in range(20)
]
ODD = {
    "short": ("lake", "who found the old lake"),
    "no title": ("", "the moon lies under the bridge"),
    "NUL and emoji": ("\0", "king \0 \N{OWL} queen"),
    "long": ("ocean", "deep ocean " * 5_000),
}


def build_with(encoder: PassageEncoder, folder: Path) -> Path:
    build_index(
        CorpusReader(write_jsonl(folder.with_suffix(".jsonl"), LINES)),
        folder,
        encoder=encoder,
        embedding_name=None,
        options=BuildOptions(),
        progress=lambda stage, done, total: None,
    )
    return folder


def encoder_of(bert_folder: Path, **settings: Any) -> PassageEncoder:
    given = {"pooling": Pooling.CLS, "normalize": True, "num_threads": 1} | settings
    return PassageEncoder(str(bert_folder), **given)


@pytest.fixture
def folder(tmp_path: Path, bert_folder: Path) -> Path:
    return build_with(encoder_of(bert_folder), tmp_path / "index")


def upsert_of(documents: dict[str, tuple[str, str]], **fields: Any) -> Any:
    return retriever_service_pb2.UpsertDocumentsRequest(
        documents=[
            document_pb2.Document(key=key, title=title, text=text) for key, (title, text) in documents.items()
        ],
        **fields,
    )


async def upsert(stub: Any, *requests: Any) -> list[Any]:
    return [response async for response in stub.UpsertDocuments(iter(requests))]


async def refused(stub: Any, *requests: Any) -> Any:
    """Returns the error of a stream, before which nothing was written."""
    before = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await upsert(stub, *requests)
    after = await stub.GetIndex(retriever_service_pb2.GetIndexRequest())
    assert (after.ntotal, after.sequence) == (before.ntotal, before.sequence)
    return caught.value


async def embeddings_by_key(stub: Any) -> dict[str, Any]:
    """Returns the embeddings of all documents, as a search gives them."""
    answer = await stub.Retrieve(
        retriever_service_pb2.RetrieveRequest(
            question_hidden_states=tensor(np.ones((1, 12))),
            n_docs=50,
            skip_contexts=True,
            include_documents=True,
            include_retrieved_doc_embeds=True,
        )
    )
    keys = [document.key for document in answer.documents]
    return dict(zip(keys, array(answer.retrieved_doc_embeds)[0], strict=True))


async def test_documents_without_embeddings_get_those_of_the_indexs_encoder(
    serve_retriever: Serve, folder: Path, bert_folder: Path
) -> None:
    """An index that had its name from the encoder's folder, as by default, refused that encoder."""
    expected = encoder_of(bert_folder).encode(list(ODD.values()))
    given = np.eye(1, 12, dtype=np.float32)
    options = {"index_folder": folder, "embedding_model": str(bert_folder)}
    async with serve_retriever(**options) as (_, stub, _):
        request = upsert_of(ODD, request_id="r")
        with_embedding = upsert_of({"given": ("", "text")}, embeddings=tensor(given))
        first, second = await upsert(stub, request, with_embedding)
        assert (first.created, second.created) == (len(ODD), 1)
        assert (await upsert(stub, request))[0] == first, "a repeated request_id was done twice"
    async with serve_retriever(**options) as (_, stub, _):
        embeddings = await embeddings_by_key(stub)
        assert len(embeddings) == len(LINES) + len(ODD) + 1
        for key, vector in zip([*ODD, "given"], np.concatenate([expected, given]), strict=True):
            np.testing.assert_allclose(embeddings[key], vector, atol=1e-6)
        read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=list(ODD)))
        assert [(one.title, one.text) for one in read.documents] == list(ODD.values())


async def test_without_an_encoder_they_are_refused_and_the_rest_of_the_stream_stays(
    serve_retriever: Serve, folder: Path
) -> None:
    async with serve_retriever(index_folder=folder) as (_, stub, _):
        error = from_rpc_error(await refused(stub, upsert_of(ODD)))
        assert (error.status, error.reason) == ("FAILED_PRECONDITION", "NO_PASSAGE_ENCODER")
        assert "give them, or start the retriever with --embedding-model" in error.message
        fine = upsert_of({"given": ("", "text")}, embeddings=tensor(np.eye(1, 12)))
        assert len(await until_refused(stub, fine, upsert_of(ODD))) == 1
        read = await stub.GetDocuments(retriever_service_pb2.GetDocumentsRequest(keys=["given", *ODD]))
        assert list(read.missing_keys) == list(ODD)


async def test_an_encoder_is_not_used_for_an_index_of_another(
    serve_retriever: Serve, folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    """Also not where only the settings differ, and only an activation brought that index."""
    build_with(encoder_of(bert_folder, pooling=Pooling.MEAN), tmp_path / "mean")
    build_with(encoder_of(bert_folder, name="another name"), tmp_path / "renamed")
    async with serve_retriever(index_folder=folder, embedding_model=str(bert_folder)) as (_, stub, _):
        await activate(stub, "mean")
        error = from_rpc_error(await refused(stub, upsert_of(ODD)))
        assert (error.status, error.reason) == ("FAILED_PRECONDITION", "NO_PASSAGE_ENCODER")
        assert "other settings: give the embeddings" in error.message
        await activate(stub, "renamed")
        assert (await upsert(stub, upsert_of(ODD)))[0].created == len(ODD)


async def activate(stub: Any, folder: str) -> None:
    asked = retriever_service_pb2.ActivateIndexRequest(index_folder=folder)
    operation = (await stub.ActivateIndex(asked)).operation
    while not operation.done:
        name = retriever_service_pb2.GetOperationRequest(name=operation.name)
        operation = (await stub.GetOperation(name)).operation
    assert not operation.HasField("error"), operation.error


async def test_an_encoder_that_gives_no_numbers_is_told_by_name(
    serve_retriever: Serve, folder: Path, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_numbers(self: PassageEncoder, passages: Any) -> Any:
        return np.full((len(passages), 12), np.nan, np.float32)

    async with serve_retriever(index_folder=folder, embedding_model=str(bert_folder)) as (_, stub, _):
        monkeypatch.setattr(PassageEncoder, "_encode_batch", no_numbers)
        error = await refused(stub, upsert_of(ODD))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violated_fields(error) == ["documents"]
        assert "gave embeddings that are not finite" in error.details()


@pytest.mark.parametrize("what", ["missing", "another"])
async def test_a_retriever_does_not_start_with_an_encoder_that_is_not_the_indexs(
    serve_retriever: Serve, folder: Path, bert_folder: Path, tmp_path: Path, what: str
) -> None:
    model = tmp_path / "model"
    if what == "another":
        from safetensors.torch import load_file, save_file

        shutil.copytree(bert_folder, model)
        weights = {name: weight + 1 for name, weight in load_file(model / "model.safetensors").items()}
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    said = {"missing": f"no passage encoder in {model}", "another": "the index was made with sha256:"}[what]
    with pytest.raises((BuildError, StartupError), match=said):
        async with serve_retriever(index_folder=folder, embedding_model=str(model)):
            pass
