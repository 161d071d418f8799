"""Mixtures over documents (Lewis et al. 2020, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def doc_log_prior(doc_scores: Tensor) -> Tensor:
    """log p(document | question): float32 log_softmax over the last dimension; -inf scores stay out."""
    return torch.log_softmax(doc_scores.float(), dim=-1)


def rag_token_mixture(log_probs: Tensor, log_prior: Tensor) -> Tensor:
    """RAG-Token's p(token | question, prefix): log_probs [n_docs, rows, vocab], log_prior [n_docs] -> [rows, vocab]."""
    return torch.logsumexp(log_probs + log_prior[:, None, None], dim=0)


def sequence_log_likelihood(doc_log_likelihood: Tensor, log_prior: Tensor) -> Tensor:
    """RAG-Sequence's log p(answer | question): [candidates, n_docs], [n_docs] -> [candidates]."""
    return torch.logsumexp(doc_log_likelihood + log_prior, dim=-1)


def sequence_posterior(doc_log_likelihood: Tensor, log_prior: Tensor) -> Tensor:
    """p(document | question, answer) under RAG-Sequence: [candidates, n_docs]."""
    return torch.softmax(doc_log_likelihood + log_prior, dim=-1)


def token_posterior(token_log_probs: Tensor, log_prior: Tensor) -> Tensor:
    """p(document | question, answer) under RAG-Token: the mean over tokens of each token's own posterior.

    token_log_probs [tokens, n_docs]. RAG-Token has one latent document a token; their mean is the share of the
    answer that each document explains. An answer without scored tokens has the prior.
    """
    if token_log_probs.shape[0] == 0:
        return torch.softmax(log_prior, dim=-1)
    return torch.softmax(token_log_probs + log_prior, dim=-1).mean(dim=0)
