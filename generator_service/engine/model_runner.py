"""Executes what the scheduler decided: encodes, runs one decoder step over all rows, takes tokens, scores."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from generator_service.decoding import marginalize
from generator_service.decoding.targets import TargetLogProbs
from generator_service.engine import scoring, tracing, tree_scoring
from generator_service.engine.messages import EncodeQuestion, GenerateAnswer, Progress, ScoreTarget
from generator_service.engine.pass_messages import ForwardPass, PassDone, QuestionPass
from generator_service.engine.pass_runner import PassRefusedError, PassRunner
from generator_service.engine.pool_scores import PoolScores
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.engine.search import FoundHypothesis, PoolKey, Search
from generator_service.engine.search_pool import SearchPool, hypotheses_of
from generator_service.engine.tree_scoring import TreeScoring
from generator_service.model.backbone import Backbone, RowBatch, RowBlock
from generator_service.model.kv_cache import ContextStates
from generator_service.model.paged.arena import ArenaFullError
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.transfers import to_device, to_host
from generator_service.types import Hypothesis, QuestionScore, Strategy

_Given = scoring.CandidateScoring | scoring.TargetScoring | tracing.Tracing
"""Tokens that are known, waiting for their step."""

_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class DeviceMemoryError(Exception):
    """A step needed more memory than the device has."""


@dataclass
class StepOutcome:
    """What came out of one step."""

    encoded: list[tuple[Request, bytes]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    answered: list[tuple[Request, list[Hypothesis]]] = field(default_factory=list)
    scored: list[tuple[Request, QuestionScore]] = field(default_factory=list)
    passed: list[tuple[Request, PassDone | PassRefusedError]] = field(default_factory=list)
    tokens: int = 0
    part_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class _Question:
    """A running request's contexts, its log_prior on the host, and what RAG-Sequence's finished searches found."""

    contexts: list[ContextStates]
    log_prior: Tensor
    found: dict[int, list[FoundHypothesis]] = field(default_factory=dict)


class ModelRunner:
    """Owns the models and everything on the device."""

    def __init__(
        self,
        backbone: Backbone,
        question_encoder: QuestionEncoder | None,
        device: torch.device,
        passes: PassRunner | None = None,
    ) -> None:
        self.backbone, self.question_encoder, self.device = backbone, question_encoder, device
        self._passes, self._waiting_passes = passes, deque[Request]()
        self._pools: dict[PoolKey, SearchPool] = {}
        self._questions: dict[int, _Question] = {}
        self._given: list[_Given] = []
        # contexts that some running question holds: an equal one of another question is not encoded again
        self._encoded: WeakValueDictionary[tuple[int, ...], ContextStates] = WeakValueDictionary()

    def execute(self, schedule: Schedule) -> StepOutcome:
        """One step: drop, encode, admit, decode, update.

        Raises DeviceMemoryError where the device has no memory for it: the running questions are then to be forgotten.
        """
        try:
            return self._execute(schedule)
        except (torch.OutOfMemoryError, ArenaFullError) as error:
            raise DeviceMemoryError from error
        except RuntimeError as error:
            if _CPU_OUT_OF_MEMORY in str(error):
                raise DeviceMemoryError from error
            raise

    @torch.inference_mode()
    def _execute(self, schedule: Schedule) -> StepOutcome:
        outcome = StepOutcome()
        for request in schedule.dropped:
            self.forget(request.request_id)
        started = time.perf_counter()
        self._encode_questions(schedule.encode, outcome)
        is_pass = [isinstance(r.work, QuestionPass | ForwardPass) for r in schedule.admit]
        self._waiting_passes.extend(itertools.compress(schedule.admit, is_pass))
        self._admit([r for r, passes in zip(schedule.admit, is_pass, strict=True) if not passes])
        outcome.part_s["encode"] += time.perf_counter() - started
        self._decode(outcome)
        self._run_pass(outcome)
        return outcome

    def forget(self, request_id: int) -> None:
        """Free all rows and contexts of a request, wherever it stands."""
        self._waiting_passes = deque(r for r in self._waiting_passes if r.request_id != request_id)
        if self._questions.pop(request_id, None) is None:
            return
        for pool in self._pools.values():
            pool.remove_request(request_id)
        self._drop_empty_pools()
        self._given = [g for g in self._given if g.request.request_id != request_id]

    @property
    def passes(self) -> PassRunner:
        """What runs forward passes."""
        assert self._passes is not None, "made without"
        return self._passes

    def _run_pass(self, outcome: StepOutcome) -> None:
        """One a step, so that those who decode go on in between; one that fails takes nobody with it."""
        if not self._waiting_passes:
            return
        started = time.perf_counter()
        request = self._waiting_passes.popleft()
        assert isinstance(request.work, QuestionPass | ForwardPass)
        try:
            outcome.passed.append((request, self.passes.run(request.work)))
        except PassRefusedError as error:
            outcome.passed.append((request, error))
        outcome.part_s["forward"] += time.perf_counter() - started

    # --- joining

    def _encode_questions(self, requests: Sequence[Request], outcome: StepOutcome) -> None:
        works = [r.work for r in requests if isinstance(r.work, EncodeQuestion)]
        if works and self.question_encoder is not None:
            hidden = self.question_encoder.encode(
                [w.input_ids for w in works], [w.attention_mask for w in works]
            )
            outcome.encoded.extend(
                (r, h.numpy().tobytes()) for r, h in zip(requests, hidden.float().cpu(), strict=True)
            )

    def _admit(self, requests: Sequence[Request]) -> None:
        wanted = {tuple(c): self._ids(c) for r in requests for c in self._context_ids(r)}
        new = {key: ids for key, ids in wanted.items() if key not in self._encoded}
        # held here until every request has its own: the dictionary alone keeps nothing alive
        states = self.backbone.encode(list(new.values())) if new else []
        self._encoded.update(zip(new, states, strict=True))
        for request in requests:
            keys = [tuple(c) for c in self._context_ids(request)]
            self._start(request, [self._encoded[key] for key in keys], [wanted[key] for key in keys])

    @staticmethod
    def _context_ids(request: Request) -> list[list[int]]:
        work = request.work
        assert isinstance(work, GenerateAnswer | ScoreTarget)
        if request.attends_pads:
            assert isinstance(work, GenerateAnswer)
            assert work.padded_contexts is not None
            return work.contexts + work.padded_contexts
        return work.contexts

    def _start(self, request: Request, states: list[ContextStates], ids: list[Tensor]) -> None:
        work = request.work
        assert isinstance(work, GenerateAnswer | ScoreTarget)
        n_docs = len(work.contexts)
        host_prior = marginalize.doc_log_prior(torch.tensor(work.doc_scores))
        prior = to_device(host_prior, torch.float32, self.device)
        self._questions[request.request_id] = _Question(states[:n_docs], host_prior)
        if isinstance(work, ScoreTarget):
            self._given.append(scoring.start_target(request, states, self.backbone, prior))
        elif work.strategy is Strategy.RAG_TOKEN:
            self._add_search(request, 0, states, ids, prior)
        else:
            for document, (state, own) in enumerate(zip(states[-n_docs:], ids[-n_docs:], strict=True)):
                self._add_search(request, document, [state], [own], prior)

    def _add_search(
        self, request: Request, document: int, states: list[ContextStates], ids: list[Tensor], prior: Tensor
    ) -> None:
        work = request.work
        assert isinstance(work, GenerateAnswer)
        cache = self.backbone.new_cache(len(states))
        search = Search(
            request,
            document,
            work.settings,
            states,
            ids,
            prior,
            self._questions[request.request_id].log_prior,
            cache,
            num_chains=request.num_chains,
        )
        self._pools.setdefault(search.key, SearchPool(search.key)).add(search)

    # --- one step of everything

    def _decode(self, outcome: StepOutcome) -> None:
        started = time.perf_counter()
        pools = [(pool, pool.blocks()) for pool in self._pools.values()]
        given, self._given = self._given, []
        blocks = [b for _, found in pools for b in found if b is not None]
        blocks += [b for item in given for b in _blocks(item)]
        if blocks:
            states = self.backbone.decode(RowBatch(blocks))
            parts = iter(torch.split(states, [b.num_rows for b in blocks]))
        else:
            parts = iter(())
        decoded = time.perf_counter()
        for pool, found in pools:
            pool.advance(self._step_scores(pool, found, [next(parts) for b in found if b is not None]))
            outcome.tokens += sum(s.key.width for s in pool.searches)
        reduced = self._reduced(given, [[next(parts) for _ in _blocks(item)] for item in given])
        scored = time.perf_counter()
        # the one reading of the device in a step where nothing finishes
        on_host = to_host([pool.news() for pool, _ in pools] + reduced)
        news, results = on_host[: len(pools)], on_host[len(pools) :]
        for item, result in zip(given, results, strict=True):
            self._finish_given(item, result, outcome)
        self._collect([(pool, told) for (pool, _), told in zip(pools, news, strict=True)], outcome)
        outcome.part_s["decode"] += decoded - started
        outcome.part_s["score"] += scored - decoded
        outcome.part_s["output"] += time.perf_counter() - scored

    def _reduced(self, given: Sequence[_Given], states: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What the host must know of given tokens; states are the decoder's for their blocks."""
        trees = list[TreeScoring]()
        tree_states = list[Tensor]()
        for item, own in zip(given, states, strict=True):
            if not isinstance(item, scoring.TargetScoring):
                trees += _tree_scorings(item)
                tree_states += own
        edges = iter(tree_scoring.edge_log_probs(trees, tree_states, self.backbone))
        return [
            scoring.reduce_target(item, own[0], self.backbone).tensors()
            if isinstance(item, scoring.TargetScoring)
            else [next(edges) for _ in own]
            for item, own in zip(given, states, strict=True)
        ]

    def _finish_given(self, item: _Given, reduced: list[Tensor], outcome: StepOutcome) -> None:
        """Score, trace or answer; reduced is _reduced's on the host."""
        request, prior = item.request, self._questions[item.request.request_id].log_prior
        if isinstance(item, scoring.CandidateScoring):
            self._answer(request, scoring.finish_candidates(item, reduced, prior), outcome)
            return
        if isinstance(item, scoring.TargetScoring):
            found = TargetLogProbs(*reduced)
            score = scoring.finish_target(item, found, self.backbone.vocab_size, prior)
            outcome.scored.append((request, score))
        else:
            outcome.answered.append((request, tracing.finish(item, reduced[0], prior)))
        del self._questions[request.request_id]

    def _step_scores(
        self, pool: SearchPool, blocks: Sequence[RowBlock | None], states: Sequence[Tensor]
    ) -> PoolScores:
        """Scores over the vocabulary for the searches that want them: one head for all."""
        rows: list[Tensor] = []
        first: list[int | None] = []
        end, per_block = 0, iter(states)
        for search, block in zip(pool.searches, blocks, strict=True):
            own = None if block is None else next(per_block)
            if own is None or not search.wants_scores:
                first.append(None)
                continue
            rows.append(own)
            first.append(end)
            end += own.shape[0]
        if not rows:
            return PoolScores(pool.key, pool.searches, None, None, first)
        logits = self.backbone.logits(torch.cat(rows))
        return PoolScores.of_logits(pool.key, pool.searches, logits, first)

    def _collect(self, news: Sequence[tuple[SearchPool, list[Tensor]]], outcome: StepOutcome) -> None:
        """Take finished searches out; answer, or go on to scoring the candidates."""
        taken = []
        for pool, told in news:
            outcome.progress += pool.progress(told)
            searches, results = pool.take_finished(told[0].tolist())
            if searches:
                taken.append((searches, results))
        self._drop_empty_pools()
        for (searches, _), results in zip(taken, to_host([r for _, r in taken]), strict=True):
            for search, found in zip(searches, hypotheses_of(results), strict=True):
                self._finish_search(search, found, outcome)

    def _finish_search(self, search: Search, found: list[FoundHypothesis], outcome: StepOutcome) -> None:
        request, work = search.request, search.request.work
        assert isinstance(work, GenerateAnswer)
        question = self._questions[request.request_id]
        if work.strategy is Strategy.RAG_TOKEN:
            hypotheses = scoring.token_hypotheses(work, found, question.log_prior)
            if request.streams and hypotheses:
                outcome.progress.append(search.rest(hypotheses[0].token_ids, found))
            self._answer(request, hypotheses, outcome)
            return
        question.found[search.document] = found
        if len(question.found) < len(work.contexts):
            return
        by_document = [question.found[d] for d in range(len(work.contexts))]
        if not any(by_document):  # the processors left no answer at all
            self._answer(request, [], outcome)
            return
        if scoring.is_fast(work):
            self._answer(request, scoring.fast_hypotheses(work, by_document, question.log_prior), outcome)
            return
        candidates = scoring.start_candidates(
            request, by_document, question.contexts, self.backbone, self.device
        )
        if candidates.missing:
            self._given.append(candidates)
        else:
            self._answer(request, scoring.finish_candidates(candidates, [], question.log_prior), outcome)

    def _answer(self, request: Request, hypotheses: list[Hypothesis], outcome: StepOutcome) -> None:
        assert isinstance(request.work, GenerateAnswer)
        if request.work.trace and hypotheses:
            contexts = self._questions[request.request_id].contexts
            self._given.append(tracing.start(request, hypotheses, contexts, self.backbone, self.device))
            return
        del self._questions[request.request_id]
        outcome.answered.append((request, hypotheses))

    def _drop_empty_pools(self) -> None:
        self._pools = {k: p for k, p in self._pools.items() if p.searches}

    def _ids(self, token_ids: list[int]) -> Tensor:
        return to_device(token_ids, torch.int64, self.device)


def _tree_scorings(item: _Given) -> list[TreeScoring]:
    match item:
        case scoring.CandidateScoring():
            return [part.scoring for part in item.missing]
        case tracing.Tracing():
            return [item.scoring]
        case scoring.TargetScoring():
            return []


def _blocks(item: _Given) -> list[RowBlock]:
    return (
        [item.block] if isinstance(item, scoring.TargetScoring) else [s.block for s in _tree_scorings(item)]
    )
