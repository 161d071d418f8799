"""Queue, cache manager and scheduler: who runs next, and what it may hold."""

from __future__ import annotations

import time

from generator_service.engine.cache_manager import CacheManager
from generator_service.engine.messages import EncodeQuestion, GenerateAnswer
from generator_service.engine.queue import WaitingQueue
from generator_service.engine.request import Request, RequestState
from generator_service.engine.scheduler import Scheduler, SchedulerLimits
from generator_service.types import Compatibility, GenerationSettings, SequenceDecoding, Strategy


def question(
    request_id: int,
    *,
    strategy: Strategy = Strategy.RAG_TOKEN,
    compatibility: Compatibility = Compatibility.MASKED,
    lengths: tuple[int, ...] = (10, 10),
    num_beams: int = 2,
    max_length: int = 6,
    priority: int = 0,
    deadline_s: float | None = None,
    padded: int | None = None,
) -> Request:
    work = GenerateAnswer(
        request_id=request_id,
        strategy=strategy,
        sequence_decoding=SequenceDecoding.THOROUGH,
        compatibility=compatibility,
        settings=GenerationSettings(num_beams=num_beams, max_length=max_length),
        contexts=[[5] * n for n in lengths],
        padded_contexts=None if padded is None else [[5] * padded for _ in lengths],
        doc_scores=[0.0] * len(lengths),
        do_deduplication=True,
        exclude_bos_score=True,
        priority=priority,
        deadline_s=deadline_s,
    )
    return Request(work)


def scheduler(budget_bytes: int = 10**9, **limits: int) -> Scheduler:
    cache = CacheManager(budget_bytes=budget_bytes, bytes_per_context_token=4, bytes_per_slot=4)
    return Scheduler(cache, SchedulerLimits(**limits))


def test_queue_gives_lower_priorities_first_and_then_the_earlier() -> None:
    queue = WaitingQueue()
    for request_id, priority in ((1, 5), (2, 0), (3, 0)):
        queue.push(question(request_id, priority=priority))
    assert [queue.pop().request_id for _ in range(3)] == [2, 3, 1]


def test_queue_forgets_removed_requests() -> None:
    queue = WaitingQueue()
    queue.push(question(1))
    queue.push(question(2))
    assert queue.remove(1) is not None
    assert queue.remove(1) is None
    assert len(queue) == 1
    assert queue.pop().request_id == 2
    assert queue.peek() is None


def test_required_bytes_count_contexts_and_slots() -> None:
    cache = CacheManager(budget_bytes=10**6, bytes_per_context_token=3, bytes_per_slot=5)
    # two contexts of 10 tokens; the first step has one row, the last token needs none: 1 + 4 * 2 slots a context
    assert cache.required_bytes(question(1)) == 20 * 3 + 2 * 9 * 5


def test_rag_sequence_also_pays_for_scoring_its_candidates() -> None:
    cache = CacheManager(budget_bytes=10**6, bytes_per_context_token=0, bytes_per_slot=1)
    candidates = 2 * 2 * 6  # beams, documents, tokens
    assert cache.required_bytes(question(1, strategy=Strategy.RAG_SEQUENCE)) == 2 * (9 + candidates)


def test_hf_mode_also_pays_for_the_padded_contexts_it_attends() -> None:
    cache = CacheManager(budget_bytes=10**6, bytes_per_context_token=1, bytes_per_slot=0)
    hf = question(1, strategy=Strategy.RAG_SEQUENCE, compatibility=Compatibility.HF, padded=30)
    assert cache.required_bytes(hf) == 10 + 10 + 30 + 30
    unpadded = question(2, strategy=Strategy.RAG_SEQUENCE, compatibility=Compatibility.HF, padded=10)
    assert cache.required_bytes(unpadded) == 20


def test_reserved_bytes_are_given_back_once() -> None:
    cache = CacheManager(budget_bytes=10**6, bytes_per_context_token=1, bytes_per_slot=1)
    request = question(1)
    assert cache.reserve(request)
    assert cache.reserved_bytes == cache.required_bytes(request)
    cache.release(request)
    cache.release(request)
    assert cache.reserved_bytes == 0


def test_admission_waits_for_memory_and_resumes_when_it_is_free() -> None:
    first, second = question(1), question(2)
    plan = scheduler(budget_bytes=300)
    plan.add_request(first)
    plan.add_request(second)
    assert plan.schedule().admit == [first]
    assert plan.schedule().admit == []
    plan.finish(first, RequestState.FINISHED_ANSWERED)
    assert plan.schedule().admit == [second]
    assert second.state is RequestState.RUNNING


def test_a_question_wider_than_a_step_still_runs_alone() -> None:
    plan = scheduler(max_rows=2)
    wide, next_one = question(1, lengths=(5, 5, 5), num_beams=4), question(2)
    plan.add_request(wide)
    plan.add_request(next_one)
    assert plan.schedule().admit == [wide]
    assert plan.schedule().admit == []


def test_one_step_encodes_no_more_context_than_it_may_but_always_some() -> None:
    plan = scheduler(max_context_tokens=30)
    requests = [question(i, lengths=(20, 20)) for i in range(3)]
    for request in requests:
        plan.add_request(request)
    assert [plan.schedule().admit for _ in range(3)] == [[r] for r in requests]


def test_questions_to_encode_go_before_waiting_answers() -> None:
    plan = scheduler()
    plan.add_request(question(1))
    encode = Request(EncodeQuestion(request_id=2, input_ids=[1], attention_mask=[1]))
    plan.add_request(encode)
    schedule = plan.schedule()
    assert schedule.encode == [encode]
    assert [r.request_id for r in schedule.admit] == [1]


def test_abort_frees_a_running_request_before_the_next_step() -> None:
    plan = scheduler()
    request = question(1)
    plan.add_request(request)
    plan.schedule()
    plan.abort(1)
    assert plan.has_work()
    assert plan.schedule().dropped == [request]
    assert request.state is RequestState.FINISHED_ABORTED
    assert plan.cache.reserved_bytes == 0
    assert not plan.has_work()


def test_expired_requests_are_dropped_waiting_or_running() -> None:
    plan = scheduler(budget_bytes=300)
    running, waiting = (
        question(1, deadline_s=time.monotonic() + 0.05),
        question(2, deadline_s=time.monotonic()),
    )
    plan.add_request(running)
    plan.schedule()
    plan.add_request(waiting)
    assert plan.schedule().dropped == [waiting]
    time.sleep(0.06)
    assert plan.schedule().dropped == [running]
    assert {running.state, waiting.state} == {RequestState.FINISHED_EXPIRED}
