"""What a pass over a known answer says of its tokens: the documents they rest on, and where the decoder looked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from generator_service.decoding import provenance
from generator_service.engine.messages import ScoreTarget
from generator_service.model.backbone import RowBlock
from generator_service.types import Strategy, Trace


def trace_target(
    log_probs: Tensor, block: RowBlock, labels: Tensor, log_prior: Tensor, work: ScoreTarget
) -> Trace:
    """The trace of a given answer: log_probs [n_docs, length, vocab] of its scoring, labels int64 [length]."""
    targets = labels[1:]
    chosen = log_probs[:, :-1].gather(2, targets[None, :, None].expand(log_probs.shape[0], -1, 1))[:, :, 0].T
    chosen = chosen.masked_fill((targets == work.pad_token_id)[:, None], 0.0)
    return trace_of(chosen, log_prior, work.strategy, block, list(range(len(targets))))


def trace_of(
    log_probs: Tensor, log_prior: Tensor, strategy: Strategy, block: RowBlock, rows: Sequence[int]
) -> Trace:
    """log_probs [tokens, n_docs] of an answer's tokens; rows are theirs in the block, whose weights are taken up."""
    posterior = provenance.token_posteriors(log_probs, log_prior, strategy)
    assert block.cross_attention is not None
    attention = [
        _bytes(block.cross_attention.of(document)[row])
        for row, document in zip(rows, posterior.argmax(1).tolist(), strict=True)
    ]
    return Trace(
        token_log_probs=_bytes(log_probs), token_posterior=_bytes(posterior), cross_attention=attention
    )


def _bytes(values: Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().astype("<f4").tobytes()
