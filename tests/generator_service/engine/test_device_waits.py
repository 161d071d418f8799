"""The host waits for the device once a step, whatever runs in it; once more where something finishes."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import torch

from generator_service import transfers
from generator_service.engine.messages import GenerateAnswer, ScoreTarget
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.types import Compatibility, GenerationSettings, Hypothesis, Strategy
from tests.generator_service.engine.counted_device import DEVICE, CountedDevice, FarBackbone, FarTensor
from tests.parity import cases, engine
from tests.parity.tiny_models import TinyRag, tiny_rag


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedDevice]:
    device = CountedDevice()
    monkeypatch.setattr(transfers, "wait_for", device.wait_for)
    with device:
        yield device


def questions(
    rag: TinyRag, settings: GenerationSettings, size: int, *, streams: bool = False
) -> list[Request]:
    """Of both strategies, each with two, three or four documents; RAG-Token's stream where asked to."""
    requests: list[Request] = []
    for index in range(size):
        batch = cases.random_batch(rag, index, n_docs=2 + index % 3, size=1)
        for strategy in Strategy:
            (request,) = engine.requests_of(batch, settings, strategy)
            assert isinstance(request.work, GenerateAnswer)
            requests.append(Request(msgspec.structs.replace(request.work, stream=streams)))
    return requests


def waits_by_step(
    rag: TinyRag, device: CountedDevice, requests: Sequence[Request]
) -> tuple[list[Counter[str]], list[list[Hypothesis]]]:
    """What the host waited for in each step, and the answers; all questions join in the first step."""
    runner = ModelRunner(FarBackbone(rag.backbone), None, DEVICE)
    schedule, steps, found = Schedule(admit=list(requests)), [], dict[int, list[Hypothesis]]()
    while len(found) < len(requests):
        device.waits.clear()
        outcome = runner.execute(schedule)
        steps.append(device.waits.copy())
        found |= {request.request_id: hypotheses for request, hypotheses in outcome.answered}
        schedule = Schedule()
    return steps, [found[r.request_id] for r in requests]


SETTINGS = {
    "beams": {"num_beams": 3},
    "forced tokens": {"num_beams": 3, "forced_bos_token_id": 5, "forced_eos_token_id": 2},
    "least length": {"num_beams": 3, "min_length": 4},
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", SETTINGS)
def test_host_waits_once_a_step_however_many_questions_run(
    case: str, streams: bool, device: CountedDevice
) -> None:
    rag = tiny_rag("bart")
    settings = cases.plain_settings(rag, max_length=8, **SETTINGS[case])
    for size in (1, 4):
        steps, answers = waits_by_step(rag, device, questions(rag, settings, size, streams=streams))
        assert all(answers)
        for step, waits in enumerate(steps):
            assert set(waits) == {"to_host"}, (size, step, waits)
            assert 1 <= waits["to_host"] <= 2, (size, step, waits)
        # before the earliest of answers ends there is nothing to read but who is done, and what is certain
        shortest = min(len(h.token_ids) for found in answers for h in found) - 1
        assert all(waits["to_host"] == 1 for waits in steps[: shortest - 1])


def test_answers_do_not_depend_on_who_counts(device: CountedDevice) -> None:
    rag = tiny_rag("t5")
    for case in SETTINGS.values():
        settings = cases.plain_settings(rag, max_length=8, **case)
        requests = questions(rag, settings, 2)
        _, found = waits_by_step(rag, device, requests)
        near = engine.answers_to(engine.new_runner(rag.backbone), requests)
        assert [[h.token_ids for h in one] for one in found] == [[h.token_ids for h in one] for one in near]
        # the CPU adds probabilities up where others add logarithms
        for one, other in zip(itertools.chain(*found), itertools.chain(*near), strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.document_posterior == pytest.approx(other.document_posterior, abs=1e-5)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_targets_are_read_with_everything_else(strategy: Strategy, device: CountedDevice) -> None:
    rag, rng = tiny_rag("bart"), random.Random(4)
    batch = cases.random_batch(rag, 4, n_docs=3, size=5)
    targets = [
        ScoreTarget(
            request_id=engine.new_id(),
            strategy=strategy,
            compatibility=Compatibility.MASKED,
            contexts=question.contexts,
            doc_scores=question.doc_scores,
            labels=[2, *(cases.word(rng) for _ in range(5))],
            pad_token_id=rag.pad_token_id,
            exclude_first=False,
        )
        for question in batch.questions
    ]
    runner = ModelRunner(FarBackbone(rag.backbone), None, DEVICE)
    outcome = runner.execute(Schedule(admit=[Request(t) for t in targets]))
    assert len(outcome.scored) == len(targets)
    assert device.waits == {"to_host": 1}


def test_counted_device_counts_what_a_gpu_waits_for(device: CountedDevice) -> None:
    """The tests above cannot fail otherwise."""
    far = torch.arange(4, device=DEVICE)
    assert isinstance(far, FarTensor)
    assert device.waits == {}
    assert int(far.sum()) == 6
    assert far[far > 1].shape == (2,)
    assert far.cpu().tolist() == [0, 1, 2, 3]
    assert torch.arange(3).to(DEVICE).device == DEVICE
    assert device.waits.total() == 4
    with pytest.raises(AssertionError, match="here and there"):
        far + torch.arange(4)
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        far.tolist()
