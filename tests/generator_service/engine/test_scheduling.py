"""Queue, cache manager and scheduler: who runs next, and what it may hold."""

from __future__ import annotations

import time
from typing import Any

import pytest

from generator_service.engine.cache_manager import CacheManager
from generator_service.engine.messages import EncodeQuestion, GenerateAnswer
from generator_service.engine.queue import WaitingQueue
from generator_service.engine.request import Request, RequestState
from generator_service.engine.room import Room
from generator_service.engine.scheduler import Scheduler, SchedulerLimits
from generator_service.types import Batching, Compatibility, GenerationSettings, SequenceDecoding, Strategy


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


def scheduler(budget_bytes: int = 10**9, **limits: Any) -> Scheduler:
    cache = CacheManager(budget_bytes=budget_bytes, bytes_per_context_token=4, bytes_per_slot=4)
    return Scheduler(cache, SchedulerLimits(**limits))


def in_order(queue: WaitingQueue) -> list[int]:
    return [request.request_id for request in queue.in_order()]


def test_queue_gives_lower_priorities_first_and_then_the_earlier() -> None:
    queue = WaitingQueue()
    for request_id, priority in ((1, 5), (2, 0), (3, 0), (4, -3)):
        queue.push(question(request_id, priority=priority))
    assert in_order(queue) == [4, 2, 3, 1]
    assert in_order(queue) == [4, 2, 3, 1], "looking takes nothing"


def test_a_level_of_priority_is_worth_its_seconds_and_no_more() -> None:
    """A fixed order of priorities would let a stream of urgent questions starve the others."""
    queue = WaitingQueue(priority_step_s=2.0)
    for request_id, priority, arrived_s in ((1, 5, 100.0), (2, 0, 109.0), (3, 0, 111.0), (4, -10, 131.0)):
        request = question(request_id, priority=priority)
        request.arrived_s = arrived_s
        queue.push(request)
    assert in_order(queue) == [2, 1, 3, 4]


def test_queue_forgets_removed_requests() -> None:
    queue = WaitingQueue()
    queue.push(question(1))
    queue.push(question(2))
    assert queue.remove(1) is not None
    assert queue.remove(1) is None
    assert len(queue) == 1
    assert in_order(queue) == [2]
    assert queue.remove(2) is not None
    assert queue.peek() is None


def test_queue_keeps_no_more_of_removed_requests_than_of_waiting_ones() -> None:
    queue = WaitingQueue()
    queue.push(question(0, priority=-10))
    for request_id in range(1, 2000):
        queue.push(question(request_id, deadline_s=time.monotonic() + 60))
        queue.remove(request_id)
    assert len(queue._heap) < 100
    assert len(queue._deadlines) < 100
    assert in_order(queue) == [0]


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


def small_ones_beside(plan: Scheduler, large: list[Request]) -> list[int]:
    """Lets large questions begin and never end: which of ten small ones, that end a step later, run beside them."""
    for request in large:
        plan.add_request(request)
    assert plan.schedule().admit == large
    for request_id in range(100, 110):
        plan.add_request(question(request_id, lengths=(2,), num_beams=1, max_length=4))
    answered: list[int] = []
    for _ in range(10):
        for request in plan.schedule().admit:
            answered.append(request.request_id)
            plan.finish(request, RequestState.FINISHED_ANSWERED)
    return answered


def test_small_questions_are_answered_beside_the_largest_one_that_is_admitted() -> None:
    """A question that took the whole cache used to hold up all others until its end."""
    largest = question(1, lengths=(1000, 1000), num_beams=8, max_length=20)
    needed = scheduler().cache.required_bytes(largest)
    budget = needed
    while not scheduler(budget).cache.can_ever_fit(largest):
        budget += 1
    assert budget == pytest.approx(needed * 16 / 15, rel=1e-3)
    assert small_ones_beside(scheduler(budget), [largest]) == list(range(100, 110))


def test_small_questions_are_answered_beside_large_ones_that_would_fill_the_cache() -> None:
    halves = [question(number, lengths=(1000,)) for number in (1, 2)]
    budget = 2 * scheduler().cache.required_bytes(halves[0])
    plan = scheduler(budget)
    for request in halves:
        plan.add_request(request)
    assert plan.schedule().admit == halves[:1], "the second would leave nothing"
    assert small_ones_beside(scheduler(budget), halves[:1]) == list(range(100, 110))


def test_small_questions_are_answered_beside_one_that_is_wider_than_a_step() -> None:
    """It used to run alone."""
    wide = question(1, lengths=(5,) * 50, num_beams=8)
    assert wide.max_rows > 160
    assert small_ones_beside(scheduler(max_rows=160), [wide]) == list(range(100, 110))


def test_a_wide_question_that_exhausts_the_device_in_company_runs_alone_in_the_end() -> None:
    plan = scheduler(max_rows=160)
    wide = question(1, lengths=(5,) * 50, num_beams=8)
    plan.add_request(wide)
    for request_id in range(100, 140):
        plan.add_request(question(request_id))
    for _ in range(20):
        plan.schedule()
        if (hopeless := plan.shed([])) or not plan.running:
            for request in hopeless:
                plan.finish(request, RequestState.FINISHED_FAILED)
        if hopeless:
            break
    assert hopeless == [wide]
    assert len(plan.waiting) == 40


def test_room_is_left_by_the_large_and_taken_by_the_small() -> None:
    room = Room(160)
    assert (room.kept, room.largest) == (10, 150)
    assert room.fits(150)
    assert not room.fits(151)
    room.take(100)
    assert not room.fits(51)
    room.take(10)
    assert room.fits(50), "what small ones have is what was kept for them"
    room.take(10)
    assert not room.fits(41)
    assert room.fits(10), "small ones may have more than is kept for them"
    for amount in (10, 100, 10):
        room.give(amount)
    assert room.taken == 0
    assert Room(15).largest == 15, "of little nothing is kept"


def test_small_questions_pass_a_large_one_that_does_not_fit_but_not_for_ever() -> None:
    """The head of the queue used to hold up everybody, however small, until it fitted."""
    plan = scheduler(budget_bytes=500, max_passes=3)
    first, large = question(0), question(99, lengths=(40, 40))
    small = [first, *(question(i) for i in range(1, 20))]
    assert not plan.cache.can_ever_fit(question(98, lengths=(90, 90)))
    plan.add_request(first)
    plan.schedule()
    plan.add_request(large)
    for request in small[1:]:
        plan.add_request(request)
    admitted: list[Request] = [first]
    order: list[int] = [0]
    while plan.has_work():
        admitted += plan.schedule().admit
        order += [r.request_id for r in admitted if r.request_id not in order]
        plan.finish(admitted.pop(0), RequestState.FINISHED_ANSWERED)
    assert order.index(99) == 4, "three may pass it, then it runs"
    assert sorted(order) == [*range(20), 99]
    assert plan.cache.reserved_bytes == 0


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


@pytest.mark.parametrize("batching", [Batching.GATHER, Batching.GATHER_EARLY])
def test_gathering_admits_nothing_until_the_whole_batch_is_answered(batching: Batching) -> None:
    plan = scheduler(batching=batching, max_context_tokens=30)
    batch = [question(i, lengths=(20, 20)) for i in range(3)]
    for request in batch:
        plan.add_request(request)
    assert plan.schedule().admit == batch, "one batch, whatever its contexts"
    late, encode = question(3), Request(EncodeQuestion(request_id=4, input_ids=[1], attention_mask=[1]))
    plan.add_request(late)
    plan.add_request(encode)
    schedule = plan.schedule()
    assert (schedule.admit, schedule.encode) == ([], [encode])
    for request in batch:
        assert plan.schedule().admit == []
        plan.finish(request, RequestState.FINISHED_ANSWERED)
    assert plan.schedule().admit == [late]


def test_gathering_stops_at_the_rows_of_a_step() -> None:
    plan = scheduler(batching=Batching.GATHER, max_rows=8)
    batch = [question(i) for i in range(3)]
    for request in batch:
        plan.add_request(request)
    assert plan.schedule().admit == batch[:2]
    plan.finish(batch[0], RequestState.FINISHED_ANSWERED)
    assert plan.schedule().admit == []
    plan.finish(batch[1], RequestState.FINISHED_ANSWERED)
    assert plan.schedule().admit == batch[2:]


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
