"""The work after the search, gathered over requests."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from retriever_service.completions import Completions


async def test_jobs_that_wait_are_taken_together_and_each_gets_its_own_result() -> None:
    with ThreadPoolExecutor(4) as pool:
        completions = Completions(pool, 1)
        hand_overs = 0
        submit = pool.submit

        def counting(*given: object) -> object:
            nonlocal hand_overs
            hand_overs += 1
            return submit(*given)  # type: ignore[arg-type]

        pool.submit = counting  # type: ignore[assignment, method-assign]
        found = await asyncio.gather(*(completions.run(lambda number=number: number) for number in range(64)))
        assert found == list(range(64))
        assert hand_overs == 4


async def test_failing_job_fails_alone() -> None:
    with ThreadPoolExecutor(1) as pool:
        completions = Completions(pool, 1)

        def fail() -> None:
            raise ValueError("mine")

        found = await asyncio.gather(
            completions.run(lambda: 1),
            completions.run(fail),
            completions.run(lambda: 3),
            return_exceptions=True,
        )
    assert found[0] == 1
    assert isinstance(found[1], ValueError)
    assert found[2] == 3


async def test_cancelled_job_is_left_out_and_the_rest_goes_on() -> None:
    with ThreadPoolExecutor(1) as pool:
        completions = Completions(pool, 1)
        gate, ran = threading.Event(), []
        first = asyncio.create_task(completions.run(gate.wait))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(completions.run(lambda: ran.append(2)))
        third = asyncio.create_task(completions.run(lambda: ran.append(3)))
        await asyncio.sleep(0.01)
        second.cancel()
        gate.set()
        await asyncio.gather(first, third)
        with pytest.raises(asyncio.CancelledError):
            await second
    assert ran == [3]
