"""Run a function in several gloo processes; a hang becomes a failure."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.helpers.forked import forkserver

TIMEOUT = timedelta(seconds=60)
"""How long a collective may wait for the other ranks."""


def run_workers(
    worker: Callable[..., None], folder: Path, *args: Any, world: int = 2, limit_s: float = 240
) -> None:
    """Call worker(rank, folder, *args) in `world` processes of one group. Raises the first error.

    `worker` must be importable by name. Kills processes that still run after `limit_s`.
    """
    store = folder / f"{worker.__name__}.store"
    forkserver()  # so that torch's processes are forked from a server that has imported everything
    context = start_processes(
        _enter, (world, store, worker, folder, args), world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + limit_s
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{worker.__name__} still runs after {limit_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _enter(
    rank: int,
    world: int,
    store: Path,
    worker: Callable[..., None],
    folder: Path,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        worker(rank, folder, *args)
    finally:
        dist.destroy_process_group()
