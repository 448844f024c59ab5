"""slotstream's own loader, as the trainer makes it."""

from collections.abc import Iterator

import torch

from pipeline.beton import Beton
from pipeline.loader import make_loader
from pipeline.source import Batch
from pipeline.views import ViewConfig
from tests.benchmark_peers.peers import Job, Views
from train.config import DataConfig

EPOCH = 64
"""Batches of the shortest epoch: the loader starts anew with each."""


def open_views(job: Job, data: str = "beton", crops: str = "", backend: str = "") -> Views:
    """With the `crops` and the `backend`, or those of the default configuration."""
    torch.set_num_threads(job.threads)
    beton = Beton(getattr(job, data))
    settings = DataConfig(path="unused")
    ways = {"crops": crops or settings.crops, "backend": backend or settings.backend}
    for batch in _batches(beton, job, ways):
        yield batch.views[0], batch.views[1]


def _batches(beton: Beton, job: Job, ways: dict[str, str]) -> Iterator[Batch]:
    """First of a run's first epoch; then of the beton with its images repeated."""
    yield next(_epoch(beton, job, ways, 0))
    from tools.benchmark.stages import repeated  # only now: no run imports it

    longer, epoch = repeated(beton, EPOCH * job.batch), 1
    while True:
        yield from _epoch(longer, job, ways, epoch)
        epoch += 1


def _epoch(beton: Beton, job: Job, ways: dict[str, str], epoch: int) -> Iterator[Batch]:
    loader = make_loader(
        beton, ViewConfig(**vars(job.recipe)), job.batch, seed=0, device=torch.device(job.device),
        threads=job.threads, **ways,
    )  # fmt: skip
    return loader.epoch(epoch)
