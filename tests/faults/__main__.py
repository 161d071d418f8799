"""Kills what changes a corpus, again and again: python -m tests.faults corpus --kills 200."""

import argparse
import tempfile
from pathlib import Path

from tests.faults import kill_build, kill_corpus, kill_milvus, kill_service
from tests.retriever_service.milvus_server import ENGINES

_PROGRAMS = {
    "corpus": kill_corpus.run,
    "build": kill_build.run,
    "service": kill_service.run,
    "milvus": kill_milvus.run,
    "milvus-engine": kill_milvus.run_engine,
}


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=_PROGRAMS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, help="of milvus and milvus-engine")
    given = parser.parse_args()
    options = {} if given.engine is None else {"engine": given.engine}
    with tempfile.TemporaryDirectory() as folder:
        counts = _PROGRAMS[given.what](Path(folder), given.kills, given.seed, say=True, **options)
    print(f"{given.kills} kills, nothing lost, nothing back; under way when killed: {dict(counts)}")


if __name__ == "__main__":
    main()
