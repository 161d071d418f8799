"""Which document a token rests on: posteriors of single tokens (Lewis et al. 2020, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from generator_service.types import Strategy


def token_posteriors(token_log_probs: Tensor, log_prior: Tensor, strategy: Strategy) -> Tensor:
    """Document posterior of every token: token_log_probs [tokens, n_docs], log_prior [n_docs] -> [tokens, n_docs].

    RAG-Token has a latent document for each token: p(document | question, prefix, token). RAG-Sequence has one for
    the answer: p(document | question, prefix up to and with the token), so that the last row is the answer's own.
    A token that does not count has zeros: it leaves the prior, or the posterior before it, as it was.
    """
    evidence = token_log_probs if strategy is Strategy.RAG_TOKEN else token_log_probs.cumsum(0)
    return torch.softmax(evidence + log_prior, dim=-1)
