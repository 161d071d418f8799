"""Builds the generated stubs before any test imports them, and sets what must be set before any import."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Triton's kernels run in its interpreter here; it looks when it is first imported, which torch may do at any time.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--milvus",
        choices=("lite", "standalone"),
        default="lite",
        help="which server the tests of the Milvus backend start: milvus-lite's, or Milvus' own engine",
    )


def pytest_configure() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import build_stubs

    if not build_stubs.is_current(ROOT / "proto", ROOT):
        build_stubs.build(ROOT / "proto", ROOT)
