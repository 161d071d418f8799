"""Readiness: all conditions must be met, reasons are told, a shutdown is final."""

import asyncio

from rag_serving.health import Readiness


def test_ready_once_every_condition_is_met() -> None:
    readiness = Readiness("index", "store")
    assert dict(readiness.reasons) == {"index": "starting", "store": "starting"}
    readiness.set_met("index")
    assert not readiness.is_ready
    readiness.set_met("store")
    assert readiness.is_ready
    assert not readiness.reasons


def test_a_lost_condition_tells_its_reason() -> None:
    readiness = Readiness()
    assert readiness.is_ready
    readiness.set_unmet("retriever", "retriever:50051 does not answer")
    assert not readiness.is_ready
    assert dict(readiness.reasons) == {"retriever": "retriever:50051 does not answer"}


def test_shutdown_is_final() -> None:
    readiness = Readiness("index")
    readiness.shut_down("shutting down")
    readiness.set_met("index")
    assert not readiness.is_ready
    assert dict(readiness.reasons) == {"shutdown": "shutting down"}


def test_listeners_hear_changes_only() -> None:
    readiness = Readiness("a", "b")
    heard: list[bool] = []
    readiness.on_change(heard.append)
    readiness.set_met("a")
    readiness.set_unmet("a", "still no")
    readiness.set_met("a")
    readiness.set_met("b")
    readiness.set_unmet("b", "lost")
    assert heard == [False, True, False]


async def test_wait_ready_returns_when_ready() -> None:
    readiness = Readiness("index")
    waiting = asyncio.create_task(readiness.wait_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    readiness.set_met("index")
    await asyncio.wait_for(waiting, 1)
