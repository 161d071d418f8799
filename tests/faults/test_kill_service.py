"""What a retriever acknowledged over the wire outlives its SIGKILL."""

from pathlib import Path

from tests.faults import kill_service


def test_a_killed_service_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    kinds = len(kill_service.KINDS)
    counts = kill_service.run(tmp_path, kills=kinds, seed=1)
    assert counts["acknowledged"] > 0
    assert counts["start"] == 1
