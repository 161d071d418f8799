"""Log-likelihood and loss of given targets, as forward(labels=...) computes them (modeling_rag.py, get_nll)."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class TargetLogProbs:
    """What a target's score is made of; every position counts, pads too.

    by_document float32 [n_docs, length]: of each target token under each document. smooth, sums over the vocabulary:
    float32 [length] of RAG-Token's mixture, whose chosen [length] holds the target tokens'; [n_docs, length] of each
    document for RAG-Sequence, which has no chosen.
    """

    by_document: Tensor
    smooth: Tensor
    chosen: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of the fields."""
        return [t for t in (self.by_document, self.smooth, self.chosen) if t is not None]


def target_log_probs(
    log_probs: Tensor, labels: Tensor, log_prior: Tensor, strategy: Strategy, pad_token_id: int
) -> TargetLogProbs:
    """Reduce log_probs float32 [n_docs, length, vocab], position i of which predicts labels[i + 1].

    labels int64 [length]; log_prior float32 [n_docs].
    """
    targets = torch.cat([labels[1:], labels.new_full((1,), pad_token_id)])
    by_document = log_probs.gather(2, targets[None, :, None].expand(log_probs.shape[0], -1, 1))[:, :, 0]
    if strategy is Strategy.RAG_SEQUENCE:
        return TargetLogProbs(by_document, log_probs.sum(2))
    mixture = marginalize.rag_token_mixture(log_probs, log_prior)  # [length, vocab]
    return TargetLogProbs(by_document, mixture.sum(1), mixture.gather(1, targets[:, None])[:, 0])


def score_target(
    found: TargetLogProbs, labels: Sequence[int], vocab_size: int, log_prior: Tensor, rules: LossRules
) -> QuestionScore:
    """Score one target; all tensors are on the host, log_prior float32 [n_docs].

    The losses are not reduced and not weighted by label smoothing's epsilon.
    """
    real = torch.tensor([token != rules.pad_token_id for token in [*labels[1:], rules.pad_token_id]])
    if rules.strategy is Strategy.RAG_TOKEN:
        return _score_token(found, real, log_prior)
    return _score_sequence(found, real, vocab_size, log_prior, rules)


def _score_token(found: TargetLogProbs, real: Tensor, log_prior: Tensor) -> QuestionScore:
    assert found.chosen is not None
    chosen = found.chosen.masked_fill(~real, 0.0)
    smooth = found.smooth.masked_fill(~real, 0.0)
    log_likelihood = float(chosen.sum())
    return QuestionScore(
        log_likelihood=log_likelihood,
        nll_loss=-log_likelihood,
        smooth_loss=-float(smooth.sum()),
        document_posterior=marginalize.token_posterior(found.by_document.T[real], log_prior).tolist(),
    )


def _score_sequence(
    found: TargetLogProbs, real: Tensor, vocab_size: int, log_prior: Tensor, rules: LossRules
) -> QuestionScore:
    chosen = found.by_document.masked_fill(~real, 0.0)  # [n_docs, length]
    smooth = found.smooth.masked_fill(~real, 0.0)
    documents = chosen.sum(1)
    kept = chosen[:, 1:].sum(1) if rules.exclude_first else documents
    # get_nll adds the prior to every entry of the second position, and so loses it where that is a pad
    second_counts = len(real) > 1 and bool(real[1])
    counted = rules.compatibility is not Compatibility.HF or second_counts
    prior = log_prior if counted else torch.zeros_like(log_prior)
    return QuestionScore(
        log_likelihood=float(marginalize.sequence_log_likelihood(documents, log_prior)),
        nll_loss=-float(torch.logsumexp(kept + prior, dim=0)),
        smooth_loss=-float(torch.logsumexp(smooth.sum(1) + vocab_size * prior, dim=0)),
        document_posterior=marginalize.sequence_posterior(documents, log_prior).tolist(),
    )
