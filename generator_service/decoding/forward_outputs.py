"""What the forward of the two RAG classes makes of per-document logits (modeling_rag.py, marginalize and get_nll)."""

from __future__ import annotations

import torch
from torch import Tensor


def marginalized(logits: Tensor, doc_scores: Tensor) -> Tensor:
    """RAG-Token's marginalize: [batch * n_docs, length, vocab], [batch, n_docs] -> log-probs [batch, length, vocab]."""
    log_probs, log_prior = _log_probs(logits, doc_scores)
    return torch.logsumexp(log_probs + log_prior[:, :, None, None], dim=1)


def token_loss(
    logits: Tensor, doc_scores: Tensor, labels: Tensor, *, pad_token_id: int, epsilon: float, reduce: bool
) -> Tensor:
    """RAG-Token's get_nll: labels [batch, length] -> [batch], or a scalar where reduced."""
    log_probs = marginalized(logits, doc_scores)
    target = _shifted(labels, pad_token_id)
    pads = target.eq(pad_token_id)
    nll = log_probs.gather(-1, target[..., None])[..., 0].masked_fill(pads, 0.0).sum(1)
    smooth = log_probs.sum(-1).masked_fill(pads, 0.0).sum(1)
    return _smoothed(-nll, -smooth, epsilon, logits.shape[-1], reduce=reduce)


def sequence_loss(
    logits: Tensor,
    doc_scores: Tensor,
    labels: Tensor,
    *,
    pad_token_id: int,
    epsilon: float,
    reduce: bool,
    excluded_bos: int | None,
) -> Tensor:
    """RAG-Sequence's get_nll: labels [batch, length] -> [batch], or a scalar where reduced.

    The prior stands on the second position, where a pad hides it (docs/parity.md, 2); excluded_bos is left out where
    every target begins with it (3).
    """
    log_probs, log_prior = _log_probs(logits, doc_scores)
    target = _shifted(labels, pad_token_id)
    pads = target.eq(pad_token_id)[:, None]
    index = target[:, None, :, None].expand(-1, log_probs.shape[1], -1, 1)
    token = log_probs.gather(-1, index)[..., 0]  # [batch, n_docs, length]
    smooth = log_probs.sum(-1)
    token[:, :, 1:2] += log_prior[:, :, None]
    smooth[:, :, 1:2] += log_prior[:, :, None] * logits.shape[-1]
    token, smooth = token.masked_fill(pads, 0.0), smooth.masked_fill(pads, 0.0)
    if excluded_bos is not None and bool(target[:, 0].eq(excluded_bos).all()):
        token = token[:, :, 1:]
    nll, smoothed = token.sum(2).logsumexp(1), smooth.sum(2).logsumexp(1)
    return _smoothed(-nll, -smoothed, epsilon, logits.shape[-1], reduce=reduce)


def _log_probs(logits: Tensor, doc_scores: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, n_docs, length, vocab] and [batch, n_docs], float32 whatever the weights are."""
    batch, n_docs = doc_scores.shape
    log_probs = torch.log_softmax(logits.float(), dim=-1).view(batch, n_docs, logits.shape[1], -1)
    return log_probs, torch.log_softmax(doc_scores.float(), dim=1)


def _shifted(labels: Tensor, pad_token_id: int) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], pad_token_id)], dim=1)


def _smoothed(nll: Tensor, smooth: Tensor, epsilon: float, vocab_size: int, *, reduce: bool) -> Tensor:
    if reduce:
        nll, smooth = nll.sum(), smooth.sum()
    return (1.0 - epsilon) * nll + epsilon / vocab_size * smooth
