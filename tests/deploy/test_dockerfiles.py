"""The Dockerfiles: clean for hadolint, non-root, and true to what the package installs."""

import re
import subprocess
import tomllib

import pytest

from tests.deploy.rendered import ROOT, tool

DOCKER = ROOT / "deploy" / "docker"
SERVICES = ["retriever", "generator"]
PORTS = {"retriever": "50051 8051", "generator": "50052 8052"}


def lines_of(service: str) -> list[str]:
    text = (DOCKER / f"{service}.Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def instructions(service: str, name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in lines_of(service) if line.startswith(f"{name} ")]


@pytest.mark.parametrize("service", SERVICES)
def test_hadolint_finds_nothing(service: str) -> None:
    done = subprocess.run(
        [tool("hadolint"), str(DOCKER / f"{service}.Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", SERVICES)
def test_entrypoint_is_an_installed_command_in_exec_form(service: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert instructions(service, "ENTRYPOINT") == [f'["rag-{service}"]']
    assert f"rag-{service}" in scripts


@pytest.mark.parametrize("service", SERVICES)
def test_image_runs_as_a_numbered_user_that_kubernetes_can_check(service: str) -> None:
    assert instructions(service, "USER") == ["10001:10001"]


@pytest.mark.parametrize("service", SERVICES)
def test_image_exposes_the_ports_of_the_service(service: str) -> None:
    assert instructions(service, "EXPOSE") == [PORTS[service]]


@pytest.mark.parametrize("service", SERVICES)
def test_base_images_are_pinned_to_a_python_that_the_package_allows(service: str) -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == ">=3.11,<3.13"
    for base in instructions(service, "FROM"):
        assert re.match(r"python:3\.1[12]-slim( AS build)?$", base)


def test_torch_version_is_the_one_of_the_constraints_and_the_makefile() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    [version] = [line.removeprefix("torch==") for line in constraints if line.startswith("torch==")]
    assert f"TORCH_VERSION ?= {version}" in (ROOT / "Makefile").read_text()
    for service in SERVICES:
        assert f"TORCH_VERSION={version}" in instructions(service, "ARG")


def test_every_extra_with_faiss_takes_the_same_version_of_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    faiss = {extra: extras[extra] for extra in ("cpu", "gpu", "cuvs")}
    assert faiss == {
        extra: [f"faiss-{name}>=1.15,<1.16"]
        for extra, name in {"cpu": "cpu", "gpu": "gpu", "cuvs": "gpu-cuvs"}.items()
    }
    assert "EXTRAS=cpu" in instructions("retriever", "ARG")


def test_generators_image_has_what_builds_its_kernels() -> None:
    """Triton builds a launcher of each kernel with a C compiler, into a folder of a home that the user lacks."""
    assert "DEVICE=cpu" in instructions("generator", "ARG")
    builds, install = [line for line in instructions("generator", "RUN") if "apt-get install" in line]
    assert re.search(r"\bg\+\+", builds)  # for the CPU's kernels
    assert re.search(r'if \[ "\$DEVICE" = gpu \]; .*\bgcc libc6-dev\b', install)
    assert "TRITON_HOME=/tmp" in " ".join(instructions("generator", "ENV"))


def test_build_context_holds_all_that_the_package_build_reads() -> None:
    allowed = {
        line[1:].rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "proto", "scripts"}
    packages = {"rag_serving", "rag_client", "retriever_service", "generator_service"}
    assert needed | packages <= allowed
