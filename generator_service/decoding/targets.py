"""Log-likelihood and loss of given targets, as forward(labels=...) computes them (modeling_rag.py, get_nll)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.decoding import marginalize
from generator_service.types import Compatibility, QuestionScore, Strategy


@dataclass(frozen=True)
class LossRules:
    """How a question's targets become a loss; a question's own share of the batch-wide BOS rule included."""

    strategy: Strategy
    compatibility: Compatibility
    exclude_first: bool
    pad_token_id: int


def score_target(log_probs: Tensor, labels: Tensor, log_prior: Tensor, rules: LossRules) -> QuestionScore:
    """Score one target.

    log_probs float32 [n_docs, length, vocab]: position i predicts labels[i + 1]; labels int64 [length];
    log_prior float32 [n_docs]. The losses are not reduced and not weighted by label smoothing's epsilon.
    """
    targets = torch.cat([labels[1:], labels.new_full((1,), rules.pad_token_id)])
    real = targets != rules.pad_token_id
    if rules.strategy is Strategy.RAG_TOKEN:
        return _score_token(log_probs, targets, real, log_prior)
    return _score_sequence(log_probs, targets, real, log_prior, rules)


def _score_token(log_probs: Tensor, targets: Tensor, real: Tensor, log_prior: Tensor) -> QuestionScore:
    mixture = marginalize.rag_token_mixture(log_probs, log_prior)  # [length, vocab]
    chosen = mixture.gather(1, targets[:, None])[:, 0].masked_fill(~real, 0.0)
    smooth = mixture.sum(1).masked_fill(~real, 0.0)
    by_document = log_probs.gather(2, targets[None, :, None].expand(log_probs.shape[0], -1, 1))[:, :, 0]
    log_likelihood = float(chosen.sum())
    return QuestionScore(
        log_likelihood=log_likelihood,
        nll_loss=-log_likelihood,
        smooth_loss=-float(smooth.sum()),
        document_posterior=marginalize.token_posterior(by_document.T[real], log_prior).tolist(),
    )


def _score_sequence(
    log_probs: Tensor, targets: Tensor, real: Tensor, log_prior: Tensor, rules: LossRules
) -> QuestionScore:
    n_docs, _, vocab = log_probs.shape
    chosen = log_probs.gather(2, targets[None, :, None].expand(n_docs, -1, 1))[:, :, 0]  # [n_docs, length]
    chosen = chosen.masked_fill(~real, 0.0)
    smooth = log_probs.sum(2).masked_fill(~real, 0.0)
    documents = chosen.sum(1)
    kept = chosen[:, 1:].sum(1) if rules.exclude_first else documents
    # get_nll adds the prior to every entry of the second position, and so loses it where that is a pad
    second_counts = targets.shape[0] > 1 and bool(real[1])
    counted = rules.compatibility is not Compatibility.HF or second_counts
    prior = log_prior if counted else torch.zeros_like(log_prior)
    return QuestionScore(
        log_likelihood=float(marginalize.sequence_log_likelihood(documents, log_prior)),
        nll_loss=-float(torch.logsumexp(kept + prior, dim=0)),
        smooth_loss=-float(torch.logsumexp(smooth.sum(1) + vocab * prior, dim=0)),
        document_posterior=marginalize.sequence_posterior(documents, log_prior).tolist(),
    )
