"""The engine's loop beside the device: step = schedule, execute, report."""

from __future__ import annotations

import logging
import time
from collections import defaultdict

from generator_service.engine.cache_manager import CacheManager
from generator_service.engine.messages import Encoded, Failed, Generated, Report, Scored, Stats, Work
from generator_service.engine.model_runner import DeviceMemoryError, ModelRunner, StepOutcome
from generator_service.engine.pass_messages import ForwardPass, QuestionPass, ReleasePast
from generator_service.engine.pass_runner import PassRefusedError
from generator_service.engine.request import Request, RequestState
from generator_service.engine.scheduler import Schedule, Scheduler, SchedulerLimits
from generator_service.types import Batching

logger = logging.getLogger(__name__)

_DEVICE_FAILED = "the device failed while it worked on this question; the log has the cause"
_DEVICE_TOO_SMALL = (
    "the device ran out of memory with this question alone: ask with fewer documents, beams or tokens"
)


class EngineCore:
    """Takes requests in, gives reports out; owns scheduler and runner. Not thread-safe: one loop drives it."""

    def __init__(self, runner: ModelRunner, *, cache_budget_bytes: int, limits: SchedulerLimits) -> None:
        self._runner = runner
        self._cache = CacheManager(
            budget_bytes=cache_budget_bytes,
            bytes_per_context_token=runner.backbone.context_bytes(1),
            bytes_per_slot=runner.backbone.slot_bytes(),
            page_slots=runner.backbone.page_slots,
        )
        self._scheduler = Scheduler(self._cache, limits)
        self._answers_together = limits.batching is Batching.GATHER
        self._held: list[Report] = []
        self._steps = 0
        self._tokens = 0
        self._part_s: dict[str, float] = defaultdict(float)

    def add_request(self, work: Work) -> Failed | None:
        """Queue a request; one that an empty device could not hold is refused at once, with the numbers."""
        request = Request(work)
        if isinstance(work, QuestionPass | ForwardPass):
            try:
                request.pass_bytes = self._runner.passes.required_bytes(work)
            except PassRefusedError as error:
                return _refused(work.request_id, error)
        if not self._cache.can_ever_fit(request):
            needed, most = self._cache.required_bytes(request), self._cache.max_request_bytes
            field = "input" if request.pass_bytes else "generation_config"
            message = (
                f"it needs {needed} bytes of cache on the device, which has {most} for one request: ask with"
                " fewer documents, beams or tokens"
            )
            return Failed(request_id=work.request_id, status="INVALID_ARGUMENT", message=message, field=field)
        self._scheduler.add_request(request)
        return None

    def release_past(self, command: ReleasePast) -> Report:
        """Free the keys and values that a forward pass left."""
        try:
            return self._runner.passes.release(command)
        except PassRefusedError as error:
            return _refused(command.request_id, error)

    def expire_past(self) -> None:
        """Free those that nobody has used for too long."""
        self._runner.passes.expire()

    def abort(self, request_id: int) -> None:
        """The caller has gone; the request's rows are free before the next step."""
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work()

    def step(self) -> list[Report]:
        """One step of everything that runs; what came out of it."""
        reports = self._step()
        return self._hold(reports) if self._answers_together else reports

    def stats(self) -> Stats:
        """What the engine holds now and has done so far."""
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            rows=self._scheduler.num_rows,
            cache_bytes=self._cache.reserved_bytes,
            cache_budget_bytes=self._cache.budget_bytes,
            steps=self._steps,
            step_s=dict(self._part_s),
            tokens=self._tokens,
            at_s=time.monotonic(),
        )

    def _step(self) -> list[Report]:
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        self._part_s["schedule"] += time.perf_counter() - started
        reports: list[Report] = [
            Failed(
                request_id=r.request_id,
                status="DEADLINE_EXCEEDED",
                message="the deadline passed in the engine",
            )
            for r in schedule.dropped
            if r.state is RequestState.FINISHED_EXPIRED
        ]
        try:
            outcome = self._runner.execute(schedule)
        except DeviceMemoryError:
            return reports + self._shed(schedule)
        except Exception:
            logger.exception("a step failed; its requests are given up")
            doomed = [*schedule.encode, *self._scheduler.running.values()]
            return reports + self._give_up(doomed, "UNAVAILABLE", _DEVICE_FAILED)
        self._steps += 1
        self._tokens += outcome.tokens
        for part, seconds in outcome.part_s.items():
            self._part_s[part] += seconds
        return reports + self._reports(schedule, outcome)

    def _hold(self, reports: list[Report]) -> list[Report]:
        """Keep answers until their batch is through."""
        released: list[Report] = []
        for report in reports:
            (self._held if isinstance(report, Generated | Scored) else released).append(report)
        if not self._scheduler.running:
            released += self._held
            self._held = []
        return released

    def _reports(self, schedule: Schedule, outcome: StepOutcome) -> list[Report]:
        reports: list[Report] = [
            Encoded(request_id=r.request_id, hidden_states=hidden) for r, hidden in outcome.encoded
        ]
        for progress in outcome.progress:  # counted here, where no failure of the step can lose it any more
            self._scheduler.running[progress.request_id].num_streamed += len(progress.token_ids)
        reports += outcome.progress
        now_s = time.monotonic()
        for request in schedule.admit:
            request.first_token_s = now_s
        for request, hypotheses in outcome.answered:
            self._scheduler.finish(request, RequestState.FINISHED_ANSWERED)
            assert request.admitted_s is not None
            assert request.first_token_s is not None
            reports.append(
                Generated(
                    request_id=request.request_id,
                    hypotheses=hypotheses,
                    queue_s=request.admitted_s - request.arrived_s,
                    first_token_s=request.first_token_s - request.arrived_s,
                    generate_s=now_s - request.admitted_s,
                )
            )
        for request, score in outcome.scored:
            self._scheduler.finish(request, RequestState.FINISHED_ANSWERED)
            reports.append(Scored(request_id=request.request_id, score=score))
        for request, passed in outcome.passed:
            state = RequestState.FINISHED_ANSWERED
            if isinstance(passed, PassRefusedError):
                state = RequestState.FINISHED_FAILED
                reports.append(_refused(request.request_id, passed))
            else:
                reports.append(passed)
            self._scheduler.finish(request, state)
        return reports

    def _shed(self, schedule: Schedule) -> list[Report]:
        """Begin all running questions anew, fewer at a time: an answer does not depend on its company."""
        running = list(self._scheduler.running.values())
        logger.warning("the device is out of memory", extra={"questions": len(running)})
        for request in running:
            self._runner.forget(request.request_id)
        hopeless = self._scheduler.shed(schedule.encode)
        return self._give_up(hopeless, "RESOURCE_EXHAUSTED", _DEVICE_TOO_SMALL)

    def _give_up(self, requests: list[Request], status: str, message: str) -> list[Report]:
        reports: list[Report] = []
        for request in requests:
            self._runner.forget(request.request_id)
            self._scheduler.finish(request, RequestState.FINISHED_FAILED)
            reports.append(Failed(request_id=request.request_id, status=status, message=message))
        return reports


def _refused(request_id: int, error: PassRefusedError) -> Failed:
    return Failed(request_id=request_id, status=error.status, message=error.message, field=error.field)
