"""What a pass over a known answer says of its tokens: the documents they rest on, and where the decoder looked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generator_service.decoding import provenance
from generator_service.engine.messages import ScoreTarget
from generator_service.model.backbone import RowBlock
from generator_service.transfers import to_host
from generator_service.types import Strategy, Trace


def trace_target(by_document: Tensor, block: RowBlock, log_prior: Tensor, work: ScoreTarget) -> Trace:
    """The trace of a given answer: by_document [n_docs, length] of its scoring, on the host as log_prior."""
    is_pad = torch.tensor([token == work.pad_token_id for token in work.labels[1:]])
    chosen = by_document[:, :-1].T.masked_fill(is_pad[:, None], 0.0)
    return trace_of(chosen, log_prior, work.strategy, block, list(range(len(is_pad))))


def trace_of(
    log_probs: Tensor, log_prior: Tensor, strategy: Strategy, block: RowBlock, rows: Sequence[int]
) -> Trace:
    """log_probs [tokens, n_docs] of an answer's tokens, on the host as log_prior.

    rows are the tokens' in the block, whose weights are taken up: one more reading of the device.
    """
    posterior = provenance.token_posteriors(log_probs, log_prior, strategy)
    assert block.cross_attention is not None
    documents = posterior.argmax(1).tolist()
    weights = {document: block.cross_attention.of(document) for document in set(documents)}
    (attention,) = to_host([[weights[d][row] for row, d in zip(rows, documents, strict=True)]])
    return Trace(
        token_log_probs=_bytes(log_probs),
        token_posterior=_bytes(posterior),
        cross_attention=[_bytes(a) for a in attention],
    )


def _bytes(values: Tensor) -> bytes:
    return values.float().contiguous().numpy().astype("<f4").tobytes()
