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
from generator_service.engine import scoring, tracing
from generator_service.engine.messages import EncodeQuestion, GenerateAnswer, Progress, ScoreTarget
from generator_service.engine.pass_messages import ForwardPass, PassDone, QuestionPass
from generator_service.engine.pass_runner import PassRefusedError, PassRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.engine.search import FoundHypothesis, PoolKey, Search
from generator_service.engine.search_pool import SearchPool, StepScores
from generator_service.model.backbone import Backbone, RowBatch, RowBlock
from generator_service.model.kv_cache import ContextStates
from generator_service.model.paged.arena import ArenaFullError
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.types import Hypothesis, QuestionScore, Strategy

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
    """A running request's contexts and, for RAG-Sequence, what its finished searches found."""

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
        self._candidates: list[scoring.CandidateScoring] = []
        self._targets: list[scoring.TargetScoring] = []
        self._tracings: list[tracing.Tracing] = []
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
        self._candidates = [c for c in self._candidates if c.request.request_id != request_id]
        self._targets = [t for t in self._targets if t.request.request_id != request_id]
        self._tracings = [t for t in self._tracings if t.request.request_id != request_id]

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
        prior = marginalize.doc_log_prior(torch.tensor(work.doc_scores, device=self.device))
        self._questions[request.request_id] = _Question(states[:n_docs], prior)
        if isinstance(work, ScoreTarget):
            self._targets.append(scoring.start_target(request, states, self.backbone, self.device))
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
            request, document, work.settings, states, ids, prior, cache, num_chains=request.num_chains
        )
        self._pools.setdefault(search.key, SearchPool(search.key)).add(search)

    # --- one step of everything

    def _decode(self, outcome: StepOutcome) -> None:
        started = time.perf_counter()
        pools = [(pool, pool.blocks()) for pool in self._pools.values()]
        candidates, targets, tracings = self._candidates, self._targets, self._tracings
        self._candidates, self._targets, self._tracings = [], [], []
        blocks = [b for _, found in pools for b in found if b is not None]
        blocks += [c.block for c in candidates] + [t.block for t in targets] + [t.block for t in tracings]
        if blocks:
            states = self.backbone.decode(RowBatch(blocks))
            parts = iter(torch.split(states, [b.num_rows for b in blocks]))
        else:
            parts = iter(())
        decoded = time.perf_counter()
        for pool, found in pools:
            pool.advance(self._step_scores(pool, found, [next(parts) for b in found if b is not None]))
            outcome.tokens += sum(s.key.width for s in pool.searches)
        for candidate in candidates:
            question = self._questions[candidate.request.request_id]
            hypotheses = scoring.finish_candidates(candidate, next(parts), self.backbone, question.log_prior)
            self._answer(candidate.request, hypotheses, outcome)
        for target in targets:
            question = self._questions.pop(target.request.request_id)
            score = scoring.finish_target(target, next(parts), self.backbone, question.log_prior)
            outcome.scored.append((target.request, score))
        for traced in tracings:
            question = self._questions.pop(traced.request.request_id)
            hypotheses = tracing.finish(traced, next(parts), self.backbone, question.log_prior)
            outcome.answered.append((traced.request, hypotheses))
        scored = time.perf_counter()
        self._collect(outcome)
        outcome.part_s["decode"] += decoded - started
        outcome.part_s["score"] += scored - decoded
        outcome.part_s["output"] += time.perf_counter() - scored

    def _step_scores(
        self, pool: SearchPool, blocks: Sequence[RowBlock | None], states: Sequence[Tensor]
    ) -> list[StepScores]:
        """Scores over the vocabulary for the searches whose next token is not forced: one head for all."""
        wanted = [s.forced_token is None for s in pool.searches]
        per_block = iter(states)
        chosen = [next(per_block) if b is not None else None for b in blocks]
        rows = [x for x, w in zip(chosen, wanted, strict=True) if w and x is not None]
        if not rows:
            return [StepScores(None, None)] * len(chosen)
        logits = self.backbone.logits(torch.cat(rows))
        lse = logits.logsumexp(dim=-1)
        scores, start = [], 0
        for x, w in zip(chosen, wanted, strict=True):
            if not w or x is None:
                scores.append(StepScores(None, None))
                continue
            end = start + x.shape[0]
            docs = pool.key.num_docs
            scores.append(
                StepScores(logits[start:end].view(docs, -1, logits.shape[1]), lse[start:end].view(docs, -1))
            )
            start = end
        return scores

    def _collect(self, outcome: StepOutcome) -> None:
        """Take finished searches out; answer, or go on to scoring the candidates."""
        for pool in list(self._pools.values()):
            for search, found in pool.take_finished():
                self._finish_search(search, found, outcome)
            outcome.progress += pool.progress()
        self._drop_empty_pools()

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
        candidates = scoring.candidates_of(work, by_document)
        self._candidates.append(
            scoring.start_candidates(request, candidates, question.contexts, self.backbone, self.device)
        )

    def _answer(self, request: Request, hypotheses: list[Hypothesis], outcome: StepOutcome) -> None:
        assert isinstance(request.work, GenerateAnswer)
        if request.work.trace and hypotheses:
            contexts = self._questions[request.request_id].contexts
            self._tracings.append(tracing.start(request, hypotheses, contexts, self.backbone, self.device))
            return
        del self._questions[request.request_id]
        outcome.answered.append((request, hypotheses))

    def _drop_empty_pools(self) -> None:
        self._pools = {k: p for k, p in self._pools.items() if p.searches}

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)
