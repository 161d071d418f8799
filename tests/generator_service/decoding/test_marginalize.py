"""Mixtures over documents, against sums of probabilities."""

import pytest
import torch

from generator_service.decoding import marginalize

PRIOR = torch.tensor([0.2, 0.5, 0.3])


def test_prior_is_a_float32_distribution_whatever_the_scores_are() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        prior = marginalize.doc_log_prior(torch.tensor([1.0, 2.0, 500.0], dtype=dtype))
        assert prior.dtype is torch.float32
        assert float(prior.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_prior_of_scores_minus_infinity_is_zero() -> None:
    prior = marginalize.doc_log_prior(torch.tensor([0.0, float("-inf"), 0.0]))
    torch.testing.assert_close(prior.exp(), torch.tensor([0.5, 0.0, 0.5]))


def test_rag_token_mixture_is_the_weighted_mean_of_probabilities() -> None:
    log_probs = torch.randn(3, 4, 7).log_softmax(-1)
    mixture = marginalize.rag_token_mixture(log_probs, PRIOR.log())
    torch.testing.assert_close(mixture.exp(), (log_probs.exp() * PRIOR[:, None, None]).sum(0))
    torch.testing.assert_close(mixture.exp().sum(-1), torch.ones(4))


def test_sequence_likelihood_and_posterior_follow_bayes() -> None:
    documents = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -0.5, -0.1]])
    joint = documents.exp() * PRIOR
    likelihood = marginalize.sequence_log_likelihood(documents, PRIOR.log())
    torch.testing.assert_close(likelihood.exp(), joint.sum(1))
    posterior = marginalize.sequence_posterior(documents, PRIOR.log())
    torch.testing.assert_close(posterior, joint / joint.sum(1, keepdim=True))


def test_token_posterior_is_the_mean_share_of_the_tokens() -> None:
    tokens = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, -0.1, -0.2]])
    joint = tokens.exp() * PRIOR
    shares = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(marginalize.token_posterior(tokens, PRIOR.log()), shares.mean(0))


def test_token_posterior_without_tokens_is_the_prior() -> None:
    torch.testing.assert_close(marginalize.token_posterior(torch.empty(0, 3), PRIOR.log()), PRIOR)
