"""Kills what changes a corpus, again and again: python -m tests.faults corpus --kills 200."""

import argparse
import tempfile
from pathlib import Path

from tests.faults import kill_build, kill_corpus, kill_milvus, kill_service

_PROGRAMS = {
    "corpus": kill_corpus.run,
    "build": kill_build.run,
    "service": kill_service.run,
    "milvus": kill_milvus.run,
}


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=_PROGRAMS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = _PROGRAMS[given.what](Path(folder), given.kills, given.seed, say=True)
    print(f"{given.kills} kills, nothing lost, nothing back; under way when killed: {dict(counts)}")


if __name__ == "__main__":
    main()
