"""The two clients are written by hand beside each other: what callers see of them must stay the same."""

import inspect
from typing import Any

import pytest

from rag_client import AsyncRagClient, RagClient


def public(client: type) -> dict[str, Any]:
    return {name: one for name, one in inspect.getmembers(client, callable) if not name.startswith("_")}


METHODS = sorted(set(public(RagClient)) | set(public(AsyncRagClient)))


def test_both_clients_are_made_alike() -> None:
    assert inspect.signature(RagClient.__init__) == inspect.signature(AsyncRagClient.__init__)


@pytest.mark.parametrize("name", METHODS)
def test_both_clients_have_the_method_with_the_same_parameters_and_docstring(name: str) -> None:
    waiting, waited = public(RagClient)[name], public(AsyncRagClient)[name]
    assert inspect.signature(waiting).parameters == inspect.signature(waited).parameters
    if name != "close":  # of the thread, too, in the one
        assert inspect.getdoc(waiting) == inspect.getdoc(waited)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"close"}))
def test_both_clients_return_the_same(name: str) -> None:
    waiting = str(inspect.signature(public(RagClient)[name]).return_annotation)
    waited = str(inspect.signature(public(AsyncRagClient)[name]).return_annotation)
    assert waiting.replace("Iterator[", "AsyncGenerator[") == waited
