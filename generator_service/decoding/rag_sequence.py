"""RAG-Sequence: candidates of all documents as one prefix tree, and their scores (Lewis et al. 2020, section 2.5)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.decoding import marginalize
from generator_service.transfers import to_device
from generator_service.types import Compatibility


@dataclass(frozen=True)
class PrefixTree:
    """Candidates that share prefixes share decoder rows.

    A row is a prefix that at least one candidate continues; an edge is a (row, next token) pair to be scored. Edges
    are on the host, rows on the device.
    """

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    ancestry: Tensor  # bool [rows, rows]: a row attends to its ancestors and itself
    edge_rows: Tensor  # int64 [edges]
    edge_tokens: Tensor  # int64 [edges]
    paths: list[list[int]]  # edges of each candidate, in order


def build_tree(candidates: Sequence[Sequence[int]], device: torch.device) -> PrefixTree:
    """The tree of candidates, each a list of token ids with the start token first."""
    rows: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    above: list[list[int]] = []  # of each row, its ancestors and itself
    tokens: list[int] = []
    paths: list[list[int]] = []
    for candidate in candidates:
        path, row = [], -1
        for token, following in itertools.pairwise(candidate):
            parent, row = row, rows.setdefault((row, token), len(tokens))
            if row == len(tokens):
                tokens.append(token)
                above.append([*(above[parent] if parent >= 0 else []), row])
            path.append(edges.setdefault((row, following), len(edges)))
        paths.append(path)
    ancestry = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    lengths = torch.tensor([len(a) for a in above], dtype=torch.int64)
    ancestry[torch.repeat_interleave(lengths), list(itertools.chain.from_iterable(above))] = True

    return PrefixTree(
        token_ids=to_device(tokens, torch.int64, device),
        positions=to_device(lengths - 1, torch.int64, device),
        ancestry=to_device(ancestry, torch.bool, device),
        edge_rows=torch.tensor([row for row, _ in edges], dtype=torch.int64),
        edge_tokens=torch.tensor([token for _, token in edges], dtype=torch.int64),
        paths=paths,
    )


@dataclass(frozen=True)
class ScoringRules:
    """Where Hugging Face's get_nll and the mathematics part (docs/parity.md, quirks 2 and 3)."""

    compatibility: Compatibility
    exclude_bos_score: bool
    bos_token_id: int | None
    pad_token_id: int


@dataclass(frozen=True)
class CandidateScores:
    """Scores of a question's candidates."""

    log_likelihood: Tensor  # float32 [candidates]: log p(candidate | question), nothing left out
    score: Tensor  # float32 [candidates]: -loss of get_nll under the rules
    posterior: Tensor  # float32 [candidates, n_docs]


def score_candidates(
    token_log_probs: Sequence[Tensor],
    candidates: Sequence[Sequence[int]],
    log_prior: Tensor,
    rules: ScoringRules,
) -> CandidateScores:
    """Marginalise candidates, each with its start token, over documents.

    token_log_probs float32 [n_docs, tokens after the start token] of each candidate, log_prior [n_docs]; on the host.
    """
    whole, kept, has_prior = [], [], []
    hf = rules.compatibility is Compatibility.HF
    starts_with_bos = [len(c) > 1 and c[1] == rules.bos_token_id for c in candidates]
    for log_probs, candidate, bos in zip(token_log_probs, candidates, starts_with_bos, strict=True):
        # a pad among the targets does not count, as in get_nll
        counted = log_probs[:, [token != rules.pad_token_id for token in candidate[1:]]]
        skip = rules.exclude_bos_score and (all(starts_with_bos) if hf else bos)
        whole.append(counted.sum(1))
        kept.append(counted[:, 1:].sum(1) if skip else whole[-1])
        has_prior.append(not hf or (len(candidate) > 2 and candidate[2] != rules.pad_token_id))
    documents = torch.stack(whole)  # [candidates, n_docs]
    counts = torch.tensor(has_prior)[:, None]
    prior = torch.where(counts, log_prior[None], torch.zeros_like(log_prior)[None])
    return CandidateScores(
        log_likelihood=marginalize.sequence_log_likelihood(documents, log_prior),
        score=torch.logsumexp(torch.stack(kept) + prior, dim=-1),
        posterior=marginalize.sequence_posterior(documents, log_prior),
    )


def fast_scores(
    document_log_probs: Sequence[dict[int, tuple[float, float]]], log_prior: Tensor
) -> CandidateScores:
    """The paper's fast decoding: a candidate counts only under documents whose beam held it.

    document_log_probs[c][d] = (log p(c | question, d), the same with exclude_bos_score applied); log_prior on the host.
    """
    absent = float("-inf")
    n_docs = int(log_prior.shape[0])
    whole = torch.tensor([[h[d][0] if d in h else absent for d in range(n_docs)] for h in document_log_probs])
    kept = torch.tensor([[h[d][1] if d in h else absent for d in range(n_docs)] for h in document_log_probs])
    return CandidateScores(
        log_likelihood=marginalize.sequence_log_likelihood(whole, log_prior),
        score=marginalize.sequence_log_likelihood(kept, log_prior),
        posterior=marginalize.sequence_posterior(whole, log_prior),
    )
