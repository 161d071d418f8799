"""Losses of one target, by hand."""

import pytest
import torch

from generator_service.decoding import targets
from generator_service.types import Compatibility, QuestionScore, Strategy

PAD, VOCAB = 1, 6
PRIOR = torch.tensor([0.6, 0.4]).log()
LABELS = torch.tensor([2, 3, 4, 5, PAD])


def rules(strategy: Strategy, compatibility: Compatibility = Compatibility.MASKED, *, first: bool = False):
    return targets.LossRules(strategy, compatibility, first, PAD)


def log_probs(length: int = 5) -> torch.Tensor:
    return torch.randn(2, length, VOCAB, generator=torch.Generator().manual_seed(1)).log_softmax(-1)


def scored(
    scores: torch.Tensor, labels: torch.Tensor, prior: torch.Tensor, by: targets.LossRules
) -> QuestionScore:
    found = targets.target_log_probs(scores, labels, prior, by.strategy, by.pad_token_id)
    return targets.score_target(found, labels.tolist(), VOCAB, prior, by)


def test_rag_token_sums_the_mixtures_of_its_tokens() -> None:
    scores = log_probs()
    found = scored(scores, LABELS, PRIOR, rules(Strategy.RAG_TOKEN))
    expected = sum(
        float((scores[:, position, token] + PRIOR).logsumexp(0)) for position, token in enumerate((3, 4, 5))
    )
    assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
    assert found.nll_loss == -found.log_likelihood
    mixture = (scores + PRIOR[:, None, None]).logsumexp(0)
    assert found.smooth_loss == pytest.approx(-float(mixture[:3].sum()), abs=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_rag_sequence_marginalises_sums_of_tokens(first: bool) -> None:
    scores = log_probs()
    found = scored(scores, LABELS, PRIOR, rules(Strategy.RAG_SEQUENCE, first=first))
    chosen = torch.stack([scores[:, position, token] for position, token in enumerate((3, 4, 5))])
    assert found.log_likelihood == pytest.approx(float((chosen.sum(0) + PRIOR).logsumexp(0)), abs=1e-5)
    kept = chosen[1:] if first else chosen
    assert found.nll_loss == pytest.approx(-float((kept.sum(0) + PRIOR).logsumexp(0)), abs=1e-5)
    assert sum(found.document_posterior) == pytest.approx(1.0)


@pytest.mark.parametrize("compatibility", list(Compatibility))
def test_prior_of_a_target_of_one_token_counts_but_in_hf_mode(compatibility: Compatibility) -> None:
    scores = log_probs(2)
    labels = torch.tensor([2, 3])
    found = scored(scores, labels, PRIOR, rules(Strategy.RAG_SEQUENCE, compatibility))
    prior = torch.zeros(2) if compatibility is Compatibility.HF else PRIOR
    assert found.nll_loss == pytest.approx(-float((scores[:, 0, 3] + prior).logsumexp(0)), abs=1e-5)
    assert found.log_likelihood == pytest.approx(float((scores[:, 0, 3] + PRIOR).logsumexp(0)), abs=1e-5)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_target_of_the_start_token_alone_is_certain(strategy: Strategy) -> None:
    found = scored(log_probs(1), torch.tensor([2]), PRIOR, rules(strategy))
    assert found.log_likelihood == pytest.approx(0.0, abs=1e-6)
    assert found.document_posterior == pytest.approx(PRIOR.exp().tolist(), abs=1e-6)
