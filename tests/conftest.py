"""Builds the generated stubs before any test imports them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import build_stubs

    if not build_stubs.is_current(ROOT / "proto", ROOT):
        build_stubs.build(ROOT / "proto", ROOT)
