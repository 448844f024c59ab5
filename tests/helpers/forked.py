"""Processes forked from a server that has imported torch and slotstream's trainer once.

Each test process that needs one starts a server of its own. Its children inherit the environment
that it began with.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = ["tests.helpers.faulty", "tests.helpers.killed", "torch._dynamo"]
"""A first optimiser step imports torch._dynamo."""


def forkserver() -> ForkServerContext:
    """The context whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
