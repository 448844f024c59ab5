"""Collectives without gradients. With one process each of them is the identity."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' equally shaped tensors [B, ...] in rank order: [world·B, ...]."""
    if world_size() == 1:
        return tensor.detach()
    source = tensor.contiguous()
    gathered = source.new_empty((world_size() * len(source), *source.shape[1:]))
    dist.all_gather_into_tensor(gathered, source)
    return gathered


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """A new tensor: the sum over ranks."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> Tensor:
    """A new tensor: the maximum of each element over ranks."""
    largest = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """A new tensor: the mean over ranks."""
    return all_reduce_sum(tensor) / world_size()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
