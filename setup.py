"""Adds the stubs that are generated from proto/ to what pyproject.toml says about the package."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_stubs  # noqa: E402  (found through the line above: a build backend has no project root on its path)

SOURCES = ["rag_serving*", "rag_client*", "retriever_service*", "generator_service*"]


class BuildPyWithStubs(build_py):
    """Generates the stubs before setuptools lists the files of a package."""

    def finalize_options(self) -> None:
        """Brings ./rag up to date with ./proto."""
        if not build_stubs.is_current(ROOT / "proto", ROOT):
            build_stubs.build(ROOT / "proto", ROOT)
        super().finalize_options()


setup(
    packages=find_packages(include=SOURCES) + build_stubs.stub_packages(ROOT / "proto"),
    cmdclass={"build_py": BuildPyWithStubs},
)
