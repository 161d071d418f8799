"""The retriever service in the place of an index of Hugging Face's RagRetriever."""

from __future__ import annotations

from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from transformers.models.rag.retrieval_rag import Index

from rag_client.client import RagClient


class RemoteIndex(Index):  # type: ignore[misc,unused-ignore]
    """The retriever service as the index of a RagRetriever: RagRetriever(config, …, index=RemoteIndex(address))."""

    def __init__(self, retriever_address: str, *, timeout_s: float = 60.0) -> None:
        # its generator's side is never called
        self._client = RagClient(retriever_address, retriever_address, timeout_s=timeout_s)
        self._initialized = False

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """Itself: from_pretrained(retriever=…) copies its arguments, and a connection has no copy."""
        return self

    def init_index(self) -> None:
        """Asks for the index once. Raises RagClientError where it is not there."""
        self._client.get_index()
        self._initialized = True

    def is_initialized(self) -> bool:
        """Whether the index has answered."""
        return self._initialized

    def get_top_docs(
        self, question_hidden_states: npt.NDArray[np.floating[Any]], n_docs: int = 5
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows [batch, n_docs] and embeddings [batch, n_docs, dim]. Raises ValueError where there are fewer."""
        found = self._client.retrieve(
            None,
            np.asarray(question_hidden_states),
            n_docs=n_docs,
            skip_contexts=True,
            include_retrieved_doc_embeds=True,
        )
        if min(found.n_docs_found, default=0) < n_docs:
            raise ValueError(f"n_docs is {n_docs}, and the index found {min(found.n_docs_found, default=0)}")
        return found.retrieved_doc_ids, cast("npt.NDArray[np.float32]", found.retrieved_doc_embeds)

    def get_doc_dicts(self, doc_ids: npt.NDArray[np.integer[Any]]) -> list[dict[str, list[str]]]:
        """For each question its documents' titles and texts. Raises KeyError for rows that do not exist."""
        rows = sorted({int(row) for row in np.asarray(doc_ids).reshape(-1)})
        found = {one.row: one for one in self._client.get_documents(rows=rows).documents}
        return [
            {
                "title": [found[int(row)].title for row in question],
                "text": [found[int(row)].text for row in question],
            }
            for question in doc_ids
        ]

    def close(self) -> None:
        """Closes the channels."""
        self._client.close()
