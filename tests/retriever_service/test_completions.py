"""The work after the search, gathered over requests."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from retriever_service.completions import Completions


async def test_jobs_that_wait_are_done_together_and_each_gets_its_own_answer() -> None:
    done: list[int] = []

    def double(numbers: Sequence[int]) -> list[int]:
        done.append(len(numbers))
        return [2 * number for number in numbers]

    with ThreadPoolExecutor(4) as pool:
        completions = Completions(pool, 1, double)
        found = await asyncio.gather(*(completions.run(number) for number in range(64)))
    assert found == [2 * number for number in range(64)]
    assert done == [32, 32]


async def test_failing_job_fails_alone() -> None:
    def invert(numbers: Sequence[int]) -> list[float]:
        return [1 / number for number in numbers]

    with ThreadPoolExecutor(1) as pool:
        completions = Completions(pool, 1, invert)
        found = await asyncio.gather(
            *(completions.run(number) for number in (1, 0, 2)), return_exceptions=True
        )
    assert found[0] == 1
    assert isinstance(found[1], ZeroDivisionError)
    assert found[2] == 0.5


async def test_cancelled_job_is_left_out_and_the_rest_goes_on() -> None:
    gate, ran = threading.Event(), []

    def work(names: Sequence[str]) -> Sequence[str]:
        gate.wait()
        ran.extend(names)
        return names

    with ThreadPoolExecutor(1) as pool:
        completions = Completions(pool, 1, work)
        first = asyncio.create_task(completions.run("first"))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(completions.run("second"))
        third = asyncio.create_task(completions.run("third"))
        await asyncio.sleep(0.01)
        second.cancel()
        gate.set()
        await asyncio.gather(first, third)
        with pytest.raises(asyncio.CancelledError):
            await second
    assert ran == ["first", "third"]
