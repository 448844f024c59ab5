"""Processes forked from a server that has imported torch and slotstream's trainer once.

Each test process that needs one starts a server of its own. Its children inherit the environment
that it began with.
"""

import multiprocessing
import os
import socket
from multiprocessing.context import ForkServerContext

PRELOADED = ["tests.helpers.faulty", "tests.helpers.killed", "torch._dynamo"]
"""A first optimiser step imports torch._dynamo."""


def forkserver() -> ForkServerContext:
    """The context whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def become_rank(rank: int, port: int) -> None:
    """Let this process find another one, as torchrun would: the first or second of two."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
