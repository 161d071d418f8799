"""Time and peak memory of one build: `python -m bench.retriever.build --docs 1000000 --kind IVF1024,PQ48x8`."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from bench.retriever.workload import Corpus, index


def main() -> None:
    """Builds an index of synthetic documents in a folder that goes afterwards, and prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kind", default="Flat")
    parser.add_argument("--keep", type=Path, help="leave the index in this folder")
    arguments = parser.parse_args()
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as scratch:
        began_s = time.monotonic()
        place = index(Corpus(arguments.docs, arguments.dim), arguments.kind, arguments.keep or Path(scratch))
        took_s = time.monotonic() - began_s
        size = {file.name: file.stat().st_size / 2**20 for file in place.glob("generation-*/*")}
    row = {
        "docs": arguments.docs,
        "dim": arguments.dim,
        "kind": arguments.kind,
        "seconds": took_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rss_before_mib": before_mib,
        "index_mib": size["index.faiss"],
        "documents_mib": size["documents.sqlite"],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
