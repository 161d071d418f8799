"""What was acknowledged outlives a killed process that changes a corpus in Milvus."""

from pathlib import Path

from tests.faults import kill_milvus


def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    counts = kill_milvus.run(tmp_path, kills=6, seed=1)
    assert counts["acknowledged"] > 0
