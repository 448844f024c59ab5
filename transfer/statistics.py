"""BatchNorm's statistics, made equal on all processes or measured anew for an evaluation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.distributed import all_reduce_mean, world_size


def share(model: nn.Module) -> None:
    """Give each process the mean of all processes' running statistics. SyncBatchNorm's are equal
    already; those of processes on CPUs are not, and one model is what is evaluated and saved.
    """
    if world_size() == 1:
        return
    for norm in _learning_norms(model):
        for name in ("running_mean", "running_var"):
            statistic = getattr(norm, name)
            statistic.copy_(all_reduce_mean(statistic))


@contextmanager
def measured(model: nn.Module, forwards: Iterable[object]) -> Iterator[None]:
    """Inside, running statistics are averages over `forwards`, an iterable whose every item is one
    forward of `model` in training mode; the ones from before are put back after it.
    """
    norms = _learning_norms(model)
    before = [(norm.momentum, _clones(norm)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts the same
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
    """Those with running statistics that training changes; a frozen one is of another class."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _clones(norm: _BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers(recurse=False)}
