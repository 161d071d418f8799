"""The candidate tree of RAG-Sequence, and the scores that come of it."""

import pytest
import torch

from generator_service.decoding import rag_sequence
from generator_service.types import Compatibility

CPU = torch.device("cpu")
PAD, BOS, END = 1, 0, 2
PRIOR = torch.tensor([0.7, 0.3]).log()


def rules(compatibility: Compatibility, *, exclude: bool = True) -> rag_sequence.ScoringRules:
    return rag_sequence.ScoringRules(compatibility, exclude, BOS, PAD)


def test_shared_prefixes_are_one_row() -> None:
    candidates = [[2, 5, 6, 7], [2, 5, 6, 8], [2, 5, 9, 7], [2, 5, 6, 7]]
    tree = rag_sequence.build_tree(candidates, CPU)
    assert tree.token_ids.tolist() == [2, 5, 6, 9]
    assert tree.positions.tolist() == [0, 1, 2, 2]
    assert tree.edge_tokens.tolist() == [5, 6, 7, 8, 9, 7]
    assert tree.edge_rows.tolist() == [0, 1, 2, 2, 1, 3]
    assert tree.paths == [[0, 1, 2], [0, 1, 3], [0, 4, 5], [0, 1, 2]]


def test_rows_attend_to_their_ancestors_and_themselves() -> None:
    tree = rag_sequence.build_tree([[2, 5, 6, 7], [2, 5, 9, 7], [2, 8, 6, 7]], CPU)
    for candidate in ([2, 5, 6], [2, 5, 9], [2, 8, 6]):
        row = next(
            r for r in range(len(tree.token_ids)) if tree.token_ids[tree.ancestry[r]].tolist() == candidate
        )
        assert tree.positions[tree.ancestry[row]].tolist() == [0, 1, 2]
        assert tree.token_ids[row] == candidate[-1]


def test_equal_tokens_at_different_depths_are_different_rows() -> None:
    tree = rag_sequence.build_tree([[5, 5, 5, 5]], CPU)
    assert tree.positions.tolist() == [0, 1, 2]
    assert tree.ancestry.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def scored(
    candidates: list[list[int]], applied: rag_sequence.ScoringRules
) -> tuple[rag_sequence.CandidateScores, torch.Tensor, rag_sequence.PrefixTree]:
    tree = rag_sequence.build_tree(candidates, CPU)
    edges = -torch.rand(2, len(tree.edge_tokens), generator=torch.Generator().manual_seed(0)) - 0.1
    log_probs = [edges[:, path] for path in tree.paths]
    return rag_sequence.score_candidates(log_probs, candidates, PRIOR, applied), edges, tree


def marginal(edges: torch.Tensor, prior: torch.Tensor = PRIOR) -> float:
    return float((edges.sum(1) + prior).logsumexp(0))


def test_candidates_are_marginalised_over_documents() -> None:
    scores, edges, tree = scored([[2, 5, 6, END], [2, 7, END]], rules(Compatibility.MASKED))
    for index, path in enumerate(tree.paths):
        assert scores.log_likelihood[index].item() == pytest.approx(marginal(edges[:, path]), abs=1e-6)
        assert scores.score[index].item() == pytest.approx(marginal(edges[:, path]), abs=1e-6)
    torch.testing.assert_close(scores.posterior.sum(1), torch.ones(2))


def test_pads_among_the_targets_do_not_count() -> None:
    scores, edges, tree = scored([[2, 5, PAD, 6, END]], rules(Compatibility.MASKED))
    kept = [e for i, e in enumerate(tree.paths[0]) if i != 1]
    assert scores.log_likelihood[0].item() == pytest.approx(marginal(edges[:, kept]), abs=1e-6)


@pytest.mark.parametrize("exclude", [False, True])
def test_bos_is_left_out_of_its_own_candidate_only(exclude: bool) -> None:
    candidates = [[2, BOS, 6, END], [2, 7, END]]
    scores, edges, tree = scored(candidates, rules(Compatibility.MASKED, exclude=exclude))
    expected = tree.paths[0][1:] if exclude else tree.paths[0]
    assert scores.score[0].item() == pytest.approx(marginal(edges[:, expected]), abs=1e-6)
    assert scores.score[1].item() == pytest.approx(marginal(edges[:, tree.paths[1]]), abs=1e-6)
    assert scores.log_likelihood[0].item() == pytest.approx(marginal(edges[:, tree.paths[0]]), abs=1e-6)


def test_hf_leaves_bos_out_only_where_all_candidates_begin_with_it() -> None:
    some, edges, tree = scored([[2, BOS, 6, END], [2, 7, END]], rules(Compatibility.HF))
    assert some.score[0].item() == pytest.approx(marginal(edges[:, tree.paths[0]]), abs=1e-6)
    every, edges, tree = scored([[2, BOS, 6, END], [2, BOS, 7, END]], rules(Compatibility.HF))
    assert every.score[0].item() == pytest.approx(marginal(edges[:, tree.paths[0][1:]]), abs=1e-6)


def test_hf_loses_the_prior_of_an_empty_answer() -> None:
    masked, edges, tree = scored([[2, END]], rules(Compatibility.MASKED))
    hf, _, _ = scored([[2, END]], rules(Compatibility.HF))
    assert masked.score[0].item() == pytest.approx(marginal(edges[:, tree.paths[0]]), abs=1e-6)
    assert hf.score[0].item() == pytest.approx(marginal(edges[:, tree.paths[0]], torch.zeros(2)), abs=1e-6)


def test_fast_scores_count_only_documents_that_held_the_candidate() -> None:
    scores = rag_sequence.fast_scores([{0: (-1.0, -0.5)}, {0: (-2.0, -2.0), 1: (-1.0, -1.0)}], PRIOR)
    assert scores.score[0].item() == pytest.approx(-0.5 + PRIOR[0].item(), abs=1e-6)
    assert scores.log_likelihood[0].item() == pytest.approx(-1.0 + PRIOR[0].item(), abs=1e-6)
    assert scores.posterior[0].tolist() == [1.0, 0.0]
    assert scores.score[1].item() == pytest.approx(marginal(torch.tensor([[-2.0], [-1.0]])), abs=1e-6)
