"""Adds the stubs that are generated from proto/ to what pyproject.toml says about the package."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
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


# The library that cpu_kernels.py loads. Without a compiler the installation goes on, and torch's own operations serve.
# OpenMP is not linked: torch has loaded one for all to see, and two would fight for the cores.
KERNELS = Extension(
    "generator_service.model._cpu_kernels",
    ["generator_service/model/cpu_kernels.cpp"],
    extra_compile_args=[
        *[
            "-std=c++17",
            "-O3",
            "-fopenmp",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=fast",
            "-Wno-psabi",
        ],
        *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    ],
    optional=True,
)

setup(
    ext_modules=[KERNELS],
    packages=find_packages(include=SOURCES) + build_stubs.stub_packages(ROOT / "proto"),
    cmdclass={"build_py": BuildPyWithStubs},
)
