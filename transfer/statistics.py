"""BatchNorm's running statistics: shared by all processes, or measured for an evaluation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.distributed import all_reduce_mean, world_size


def share(model: nn.Module) -> None:
    """Give each process the mean of all processes' running statistics. On GPUs SyncBatchNorm keeps
    them equal; on CPUs they differ, but a run evaluates and saves one model.
    """
    if world_size() == 1:
        return
    for norm in _learning_norms(model):
        for name in ("running_mean", "running_var"):
            statistic = getattr(norm, name)
            statistic.copy_(all_reduce_mean(statistic))


@contextmanager
def measured(model: nn.Module, forwards: Iterable[object]) -> Iterator[None]:
    """Inside its `with`, running statistics are averages over `forwards`. Each item of this
    iterable is one forward of `model` in training mode. Afterwards the old statistics return.
    """
    norms = _learning_norms(model)
    before = [(norm.momentum, _clones(norm)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
    try:
        with torch.no_grad():
            for _ in forwards:
                pass
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)


def _learning_norms(model: nn.Module) -> list[_BatchNorm]:
    """The norms whose running statistics training changes. Frozen norms have another class."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _clones(norm: _BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers(recurse=False)}
