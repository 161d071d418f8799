"""One more pass over answers that are known: what each token owes to which document, and where it looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from generator_service.decoding import logits_processors
from generator_service.engine import trace, tree_scoring
from generator_service.engine.messages import GenerateAnswer
from generator_service.engine.request import Request
from generator_service.engine.tree_scoring import TreeScoring
from generator_service.model.backbone import Backbone
from generator_service.model.cross_attention_scores import CrossAttentionScores
from generator_service.model.kv_cache import ContextStates
from generator_service.types import Hypothesis, Strategy


@dataclass
class Tracing:
    """A question's answers, laid out as one prefix tree over all its contexts, waiting for their step."""

    request: Request
    hypotheses: list[Hypothesis]
    scoring: TreeScoring


def start(
    request: Request,
    hypotheses: list[Hypothesis],
    contexts: Sequence[ContextStates],
    backbone: Backbone,
    device: torch.device,
) -> Tracing:
    """Teacher-forces the answers on the contexts that the question still holds: nothing is encoded again."""
    scoring = tree_scoring.lay_out([h.token_ids for h in hypotheses], contexts, backbone, device)
    scoring.block.cross_attention = CrossAttentionScores(len(contexts))
    return Tracing(request, hypotheses, scoring)


def finish(tracing: Tracing, edges: Tensor, log_prior: Tensor) -> list[Hypothesis]:
    """The answers with their traces; edges are tree_scoring.edge_log_probs of its tree, on the host as log_prior."""
    work = tracing.request.work
    assert isinstance(work, GenerateAnswer)
    traced, tree = [], tracing.scoring.tree
    for hypothesis, path in zip(tracing.hypotheses, tree.paths, strict=True):
        counted = torch.tensor(_counted(work, hypothesis.token_ids))
        log_probs = edges[:, path].T.masked_fill(~counted[:, None], 0.0)  # [tokens, n_docs]
        rows = [int(tree.edge_rows[edge]) for edge in path]
        found = trace.trace_of(log_probs, log_prior, work.strategy, tracing.scoring.block, rows)
        traced.append(msgspec.structs.replace(hypothesis, trace=found))
    return traced


def _counted(work: GenerateAnswer, token_ids: Sequence[int]) -> list[bool]:
    """Which generated tokens speak for documents: as in the answer's own document_posterior."""
    settings = work.settings
    if work.strategy is Strategy.RAG_SEQUENCE:
        return [token != settings.pad_token_id for token in token_ids[1:]]
    return [
        logits_processors.forced_token(settings, position) is None for position in range(1, len(token_ids))
    ]
