"""Work that scores given tokens rather than choosing them: RAG-Sequence's candidates, and targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from generator_service.decoding import marginalize, rag_sequence, targets
from generator_service.engine import trace, tree_scoring
from generator_service.engine.messages import GenerateAnswer, ScoreTarget
from generator_service.engine.request import Request
from generator_service.engine.search import FoundHypothesis
from generator_service.engine.tree_scoring import TreeScoring
from generator_service.model.backbone import Backbone, RowBlock
from generator_service.model.cross_attention_scores import CrossAttentionScores
from generator_service.model.kv_cache import ContextStates
from generator_service.transfers import to_device
from generator_service.types import Compatibility, Hypothesis, QuestionScore, SequenceDecoding


@dataclass
class CandidatesOfDocuments:
    """Candidates, by index, that are scored under the same documents."""

    documents: list[int]
    candidates: list[int]
    scoring: TreeScoring


@dataclass
class CandidateScoring:
    """RAG-Sequence's candidates of one question, waiting for their step.

    log_probs float32 [n_docs, tokens] of each candidate, on the host: set where a document's own search has found it,
    and to be set for what is in missing.
    """

    request: Request
    candidates: list[list[int]]
    log_probs: list[Tensor]
    missing: list[CandidatesOfDocuments]


@dataclass
class TargetScoring:
    """A target of one question, waiting for its step; log_prior float32 [n_docs] on the device."""

    request: Request
    labels: Tensor
    log_prior: Tensor
    block: RowBlock


def candidates_of(work: GenerateAnswer, found: Sequence[Sequence[FoundHypothesis]]) -> list[list[int]]:
    """All documents' hypotheses, document by document, as get_nll is given them."""
    settings = work.settings
    rows = [h.token_ids for document in found for h in document]
    if work.compatibility is Compatibility.HF and settings.is_beam_search:
        fill = settings.beam_fill_token_id
        if fill != settings.pad_token_id:  # Hugging Face fills with the end token, and scores it
            widest = max(len(r) for r in rows)
            rows = [r + [fill] * (widest - len(r)) for r in rows]
    if work.do_deduplication:
        rows = [list(r) for r in dict.fromkeys(tuple(r) for r in rows)]
    return rows


def start_candidates(
    request: Request,
    found: Sequence[Sequence[FoundHypothesis]],
    contexts: Sequence[ContextStates],
    backbone: Backbone,
    device: torch.device,
) -> CandidateScoring:
    """Lay the candidates out as rows over the contexts whose own searches do not know them; found is by document."""
    assert isinstance(request.work, GenerateAnswer)
    candidates = candidates_of(request.work, found)
    log_probs = [torch.zeros(len(contexts), len(c) - 1) for c in candidates]
    documents_of = defaultdict[tuple[int, ...], list[int]](list)
    for document, hypotheses in enumerate(found):
        known = {tuple(h.token_ids): h.token_log_probs[:, 0] for h in hypotheses}
        missing = []
        for index, candidate in enumerate(candidates):
            own = known.get(tuple(candidate)) if request.search_scores else None
            if own is None:
                missing.append(index)
            else:
                log_probs[index][document] = own
        if missing:
            documents_of[tuple(missing)].append(document)
    laid_out = [
        CandidatesOfDocuments(
            documents,
            list(which),
            tree_scoring.lay_out(
                [candidates[i] for i in which], [contexts[d] for d in documents], backbone, device
            ),
        )
        for which, documents in documents_of.items()
    ]
    return CandidateScoring(request, candidates, log_probs, laid_out)


def start_target(
    request: Request, contexts: Sequence[ContextStates], backbone: Backbone, log_prior: Tensor
) -> TargetScoring:
    """Lay a target out as rows over all the question's contexts; log_prior float32 [n_docs] on the device."""
    device = log_prior.device
    work = request.work
    assert isinstance(work, ScoreTarget)
    labels = to_device(work.labels, torch.int64, device)
    positions = torch.arange(len(work.labels), device=device)
    cache = backbone.new_cache(len(contexts))
    cache.append(labels, positions)
    ancestry = torch.ones(len(labels), len(labels), dtype=torch.bool, device=device).tril()
    block = RowBlock(labels, positions, contexts, cache, ancestry)
    if work.trace:
        block.cross_attention = CrossAttentionScores(len(contexts))
    return TargetScoring(request, labels, log_prior, block)


def finish_candidates(
    scoring: CandidateScoring, edges: Sequence[Tensor], log_prior: Tensor
) -> list[Hypothesis]:
    """Answers, best first; edges are tree_scoring.edge_log_probs of what is missing, on the host as log_prior."""
    work = scoring.request.work
    assert isinstance(work, GenerateAnswer)
    for part, of_documents in zip(scoring.missing, edges, strict=True):
        for index, path in zip(part.candidates, part.scoring.tree.paths, strict=True):
            scoring.log_probs[index][part.documents] = of_documents[:, path]
    rules = rag_sequence.ScoringRules(
        work.compatibility, work.exclude_bos_score, work.settings.bos_token_id, work.settings.pad_token_id
    )
    scores = rag_sequence.score_candidates(scoring.log_probs, scoring.candidates, log_prior, rules)
    return ranked(scoring.candidates, scores, work.settings.num_return_sequences)


def fast_hypotheses(
    work: GenerateAnswer, found: Sequence[Sequence[FoundHypothesis]], log_prior: Tensor
) -> list[Hypothesis]:
    """Answers by the paper's fast decoding: no further pass over the model. log_prior is on the host."""
    held: dict[tuple[int, ...], dict[int, tuple[float, float]]] = {}
    for document, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            tokens = hypothesis.token_ids
            bos = work.exclude_bos_score and len(tokens) > 1 and tokens[1] == work.settings.bos_token_id
            log_probs = hypothesis.token_log_probs[:, 0]
            sums = (float(log_probs.sum()), float(log_probs[1:].sum() if bos else log_probs.sum()))
            held.setdefault(tuple(tokens), {})[document] = sums
    scores = rag_sequence.fast_scores(list(held.values()), log_prior)
    return ranked([list(c) for c in held], scores, work.settings.num_return_sequences)


def is_fast(work: GenerateAnswer) -> bool:
    """Whether candidates count only under the documents whose beam held them."""
    return work.sequence_decoding is SequenceDecoding.FAST


def ranked(candidates: list[list[int]], scores: rag_sequence.CandidateScores, count: int) -> list[Hypothesis]:
    """The best candidates; fewer than count where there are no more."""
    order = torch.sort(scores.score, descending=True, stable=True)[1][:count].tolist()
    return [
        Hypothesis(
            token_ids=candidates[i],
            score=float(scores.score[i]),
            log_likelihood=float(scores.log_likelihood[i]),
            document_posterior=scores.posterior[i].tolist(),
        )
        for i in order
    ]


def token_hypotheses(
    work: GenerateAnswer, found: Sequence[FoundHypothesis], log_prior: Tensor
) -> list[Hypothesis]:
    """RAG-Token's answers, best first, with what each owes to which document. log_prior is on the host."""
    out = []
    for hypothesis in found:
        real = hypothesis.token_log_probs.abs().sum(1) > 0  # forced tokens are certain: they say nothing
        log_probs = hypothesis.token_log_probs[real]
        log_likelihood = float(torch.logsumexp(log_probs + log_prior, dim=1).sum())
        out.append(
            Hypothesis(
                token_ids=hypothesis.token_ids,
                score=hypothesis.score if work.settings.is_beam_search else log_likelihood,
                log_likelihood=log_likelihood,
                document_posterior=marginalize.token_posterior(log_probs, log_prior).tolist(),
            )
        )
    out.sort(key=lambda h: -h.score)
    return out[: work.settings.num_return_sequences]


def reduce_target(scoring: TargetScoring, states: Tensor, backbone: Backbone) -> targets.TargetLogProbs:
    """What the host must know of a target; states are the decoder's for the scoring's block."""
    work = scoring.request.work
    assert isinstance(work, ScoreTarget)
    log_probs = torch.log_softmax(backbone.logits(states).float(), dim=-1)
    shaped = log_probs.view(len(scoring.block.contexts), len(work.labels), -1)
    return targets.target_log_probs(
        shaped, scoring.labels, scoring.log_prior, work.strategy, work.pad_token_id
    )


def finish_target(
    scoring: TargetScoring, found: targets.TargetLogProbs, vocab_size: int, log_prior: Tensor
) -> QuestionScore:
    """Score of a target; found is reduce_target's, on the host as log_prior."""
    work = scoring.request.work
    assert isinstance(work, ScoreTarget)
    rules = targets.LossRules(work.strategy, work.compatibility, work.exclude_first, work.pad_token_id)
    score = targets.score_target(found, work.labels, vocab_size, log_prior, rules)
    if not work.trace:
        return score
    traced = trace.trace_target(found.by_document, scoring.block, log_prior, work)
    return msgspec.structs.replace(score, trace=traced)
