"""Faulty runs, in this process and in others, for tests/train/run/test_faults.py."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from pipeline.source import Batch
from tests.helpers.forked import become_rank, forkserver, free_port
from tests.helpers.training import run_dir, small_run, trainer
from train import metrics, pretrain
from train.config import RunConfig
from train.run import checkpoint
from train.run.settings import to_yaml
from train.run.signals import StopSignals
from train.trainer import Trainer

Seen = dict[int, list[tuple[int, float]]]
"""For each step the images of a process: index and sum of the views."""


def separable_run(beton: Path, folder: Path, name: str = "run") -> RunConfig:
    """With `freeze`, a run whose gradient is the mean of its processes' gradients."""
    config = small_run(beton, folder, name)
    return replace(config, model=replace(config.model, group_loss_weight=1.0))


def freeze(training: Trainer) -> Trainer:
    """Normalise by running statistics, which do not depend on the other images of a batch."""
    for module in training.slotcon.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eval()
    return training


def make(
    config: RunConfig, resume: str | None = None, signals: StopSignals | None = None
) -> Trainer:
    return freeze(trainer(config, resume, signals))


def fingerprints(batch: Batch) -> list[tuple[int, float]]:
    """Index and sum of the views of each image."""
    sums = batch.views.double().sum(dim=(0, 2, 3, 4)).tolist()
    return list(zip(batch.index.tolist(), sums, strict=True))


def watch(training: Trainer) -> Seen:
    """The images that the steps of `training` will read, filled in as it trains."""
    epoch, seen = training.loader.epoch, Seen()

    def watched(number: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(epoch(number, start), start):
            seen[number * training.loader.steps_per_epoch + step] = fingerprints(batch)
            yield batch

    training.loader.epoch = watched  # type: ignore[method-assign]
    return seen


def at_micro_batch(count: int, act: Callable[[], None]) -> Callable[..., None]:
    """A Meter.add that calls `act` once, after `count` micro-batches of this process."""
    add, done = metrics.Meter.add, []

    def counting(meter: metrics.Meter, *output: object) -> None:
        add(meter, *output)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == count:
            act()

    return counting


class Pair:
    """Two processes of a run without a launcher that cleans up after them. `fault` is "SIGNAL:N":
    the second sends itself this signal after N micro-batches. The first one writes checkpoints, to
    a slow disk. They list the images of their steps in RUN.rank0 and RUN.rank1, beside RUN.
    """

    def __init__(self, config: RunConfig, fault: str, *options: str) -> None:
        file = Path(config.log.dir) / f"{config.name}.yaml"
        file.write_text(to_yaml(config))
        context, port = forkserver(), free_port()
        self.errors = [Path(f"{run_dir(config)}.stderr{rank}") for rank in (0, 1)]
        command = ["train.pretrain", "--config", str(file), *options]
        self.processes = [
            context.Process(target=_run, args=(rank, port, fault, command, self.errors[rank]))
            for rank in (0, 1)
        ]
        for process in self.processes:
            process.start()

    def end(self, rank: int) -> tuple[int | None, str]:
        """Wait for the end of one process; its exit code and its stderr."""
        self.processes[rank].join(120)
        return self.processes[rank].exitcode, self.errors[rank].read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _run(rank: int, port: int, fault: str, command: list[str], errors: Path) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    become_rank(rank, port)
    sys.argv = command
    if rank == 1:
        name, _, count = fault.partition(":")
        send = partial(os.kill, os.getpid(), signal.Signals[name])
        metrics.Meter.add = at_micro_batch(int(count), send)  # type: ignore[method-assign]
    else:
        checkpoint._flush = partial(_slowly, checkpoint._flush)
    train_step = Trainer._train_step

    def logging(training: Trainer, batches: Iterator[Batch]) -> None:
        freeze(training)
        batch = next(batches)
        with Path(f"{training.run.folder}.rank{rank}").open("a") as file:
            for index, total in fingerprints(batch):
                file.write(f"{training.run.step} {index} {total!r}\n")
        train_step(training, iter([batch]))

    Trainer._train_step = logging  # type: ignore[method-assign]
    pretrain.main()


def _slowly(flush: Callable[[Path], None], path: Path) -> None:
    """A slow disk: the other process has to wait."""
    time.sleep(0.2)
    flush(path)
