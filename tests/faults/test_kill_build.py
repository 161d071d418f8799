"""A killed build goes on, and meanwhile what serves is whole."""

from pathlib import Path

from tests.faults import kill_build


def test_a_killed_build_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    counts = kill_build.run(tmp_path, kills=6, seed=1)
    assert counts.total() == 6 + counts["builds"]
