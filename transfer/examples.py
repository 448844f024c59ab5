"""The order of the examples, and the generator for each one. Both follow from the seed, the epoch
and the example's index, whatever the number of workers, processes and resumes.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pipeline.errors import UserError
from pipeline.order import permutation
from train.run.signals import SIGNALS
from transfer.config import OptimConfig
from transfer.task import Task


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator for example `index` in `epoch`."""
    counter = np.array([0, 0, index, 1], np.uint64)  # the order of the epoch begins at 0, 0, 0, 0
    key = np.array([seed, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


Visit = tuple[int, int]
"""The index of an example, and the epoch that reads it."""


class Order:
    """Which examples each step takes. An epoch takes as many as fill whole steps, each once, and
    drops the rest.
    """

    def __init__(self, examples: int, optim: OptimConfig, rank: int, world: int) -> None:
        """Raises UserError if an epoch has no step, or `world` processes cannot share a step."""
        batch = optim.batch_size
        if batch % world:
            raise UserError(
                f"optim.batch_size: {batch} images cannot be shared equally by {world} processes"
            )
        if batch > examples:
            raise UserError(
                f"optim.batch_size: {batch} images are more than the {examples} of the training set"
            )
        self.steps_per_epoch = examples // batch
        self._examples, self._seed, self._batch = examples, optim.seed, batch
        share = batch // world
        self._share = slice(rank * share, (rank + 1) * share)

    def steps(self, begin: int, end: int) -> Iterator[list[Visit]]:
        """This process's share of each step from `begin` to `end` - 1."""
        epoch, images = -1, np.empty(0, np.int64)
        for step in range(begin, end):
            now, number = divmod(step, self.steps_per_epoch)
            if now != epoch:
                epoch, images = now, permutation(self._examples, self._seed, now)
            batch = images[number * self._batch : (number + 1) * self._batch]
            yield [(int(index), epoch) for index in batch[self._share]]


@contextmanager
def batches(
    task: Task, order: Order, begin: int, end: int, workers: int, accelerator: Accelerator
) -> Iterator[Iterator[Any]]:
    """This process's batches of the steps from `begin` to `end` - 1, on its device. `workers`
    processes make them, and end with the `with`. Enter it in the main thread.

    The iterator raises UserError for an example that cannot be read, and if a worker ends early.
    """
    loader: DataLoader[Any] = DataLoader(
        _Examples(task),
        batch_sampler=order.steps(begin, end),
        collate_fn=partial(_collate, task),
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers else None,  # a task's model is not pickled
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # or the loader would use up the model's random numbers
    )
    ahead = iter(loader)
    if workers:  # torch's handler could raise anywhere, even later; `next` reports it as well
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield _on(accelerator.device, ahead)
    finally:
        # The traceback of an error keeps `ahead` and its workers alive. Python would wait for them
        # at its end, because they ignore SIGTERM.
        if isinstance(ahead, _MultiProcessingDataLoaderIter):
            ahead._shutdown_workers()


def _on(device: torch.device, ahead: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(ahead, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A worker that ends in its last batch raises one of the last two.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"efficiency.workers: a worker has ended ({error}): is there enough memory for so "
                "many?"
            ) from error
        if batch is None:
            return
        if isinstance(batch, UserError):
            raise batch
        yield send_to_device(batch, device, non_blocking=True)


class _Examples(Dataset[Any]):
    def __init__(self, task: Task) -> None:
        self._task = task

    def __getitem__(self, visit: Visit) -> Any:
        """The example, or the UserError: if a worker raised it, its message would hold the worker's
        traceback.
        """
        try:
            return self._task.example(*visit)
        except UserError as error:
            return error


def _collate(task: Task, examples: list[Any]) -> Any:
    errors = [each for each in examples if isinstance(each, UserError)]
    return errors[0] if errors else task.collate(examples)


def _ignore_signals(worker: int) -> None:
    """A worker lives until its process has acted on the signal."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
