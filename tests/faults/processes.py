"""Processes to kill: forked from one that has imported all they need, so that they start at once."""

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "tests.faults.changing_corpus",
    "tests.faults.changing_milvus",
    "tests.faults.kill_build",
    "tests.faults.service_process",
    # The retriever imports it late: it takes seconds.
    "transformers.models.auto.tokenization_auto",
]


def context() -> ForkServerContext:
    """Returns where such processes come from; the same for all, as a program has one fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
