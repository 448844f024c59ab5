"""One peer's turn, in a process of its own: `python -m tests.benchmark_peers.turn JOB START`.

JOB is JSON, START the monotonic time at which the process was started. Prints a line of JSON.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import psutil

from tests.benchmark_peers.peers import Job, Views, open_views

if TYPE_CHECKING:
    from torch import Tensor

LOOKED_AT = 2
"""Batches whose views are described."""
WEIGHED = 4
"""Batches after the timed part, between which memory is read."""


@dataclass(frozen=True)
class Turn:
    """What a turn measured."""

    first_batch_s: float
    """From the start of the process until the first batch is on the device."""
    images_per_s: float = 0.0
    cpu_ms: float = 0.0
    """CPU time of the process and its workers for an image."""
    memory_gb: float = 0.0
    """Peak of the process and its workers: their PSS, in which shared pages count once."""
    mean: float = 0.0
    """Of all values of some views."""
    std: float = 0.0


def take(job: Job, started: float) -> Turn:
    """Measure the job's peer in this process, which started at the monotonic time `started`."""
    views = open_views(job)
    first = next(views)
    _wait(job)
    first_batch = time.monotonic() - started
    if not job.seconds:
        return Turn(first_batch)
    mean, std = describe([first, *(next(views) for _ in range(LOOKED_AT - 1))])
    consume(views, job, job.warm_up)
    cpu = _cpu_seconds()
    batches, seconds = consume(views, job, job.seconds)
    cpu = _cpu_seconds() - cpu
    images = batches * job.batch
    memory = 0
    for _ in range(WEIGHED):
        next(views)
        memory = max(memory, _memory())
    return Turn(first_batch, images / seconds, 1e3 * cpu / images, memory / 1e9, mean, std)


def consume(views: Views, job: Job, seconds: float) -> tuple[int, float]:
    """Take batches for at least `seconds`; returns how many, and the seconds.

    Workers finish their batches together, so that as many batches as there are workers count.
    """
    began, batches = time.monotonic(), 0
    while True:
        next(views)
        batches += 1
        if batches % job.threads == 0:
            _wait(job)
            if (passed := time.monotonic() - began) >= seconds:
                return batches, passed


def describe(batches: "list[tuple[Tensor, Tensor]]") -> tuple[float, float]:
    """Mean and standard deviation of all values."""
    import torch

    values = torch.cat([view.float().flatten() for pair in batches for view in pair])
    return values.mean().item(), values.std().item()


def _wait(job: Job) -> None:
    if job.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _tree() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu_seconds() -> float:
    """Of this process, its workers, and those that have ended."""
    return sum(sum(process.cpu_times()[:4]) for process in _tree())


def _memory() -> int:
    """Bytes."""
    return sum(process.memory_full_info().pss for process in _tree())


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    os.sched_setaffinity(0, cores)  # inherited by threads and workers
    turn = take(job, float(sys.argv[2]))
    print(json.dumps(asdict(turn)), flush=True)
    os._exit(0)  # some peers' threads never end; the caller ends the workers


if __name__ == "__main__":
    main()
