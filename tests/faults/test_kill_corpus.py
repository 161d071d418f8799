"""What was acknowledged outlives a killed process."""

from pathlib import Path

from tests.faults import kill_corpus


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    counts = kill_corpus.run(tmp_path, kills=8, seed=1)
    assert counts["acknowledged"] > 0
