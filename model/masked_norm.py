"""BatchNorm over some of the rows of a buffer of fixed size.

C positions of the buffer, D features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from model.distributed import all_reduce_sum


def masked_batch_norm(layer: _BatchNorm, rows: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Apply `layer` to the valid rows of `rows` [C, D] as if there were no others: [C, D].

    valid bool [C]; count int64 scalar: the number of rows that are normalised together, over all
    ranks if `layer` is a SyncBatchNorm. The host reads no number from the device. The other rows
    of the result hold finite values that mean nothing. With fewer than two valid rows the running
    statistics do not change. In eval mode rows do not depend on each other, so this calls `layer`.
    """
    if not layer.training:
        return layer(rows)
    synced = isinstance(layer, nn.SyncBatchNorm)
    normalised, mean, variance = _MaskedNorm.apply(
        rows, layer.weight, layer.bias, valid, count, layer.eps, synced
    )
    _update_running(layer, mean, variance, count)
    return normalised


class _MaskedNorm(Function):
    """Keeps only its input for the backward pass, in the input's precision."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        valid: Tensor,
        count: Tensor,
        eps: float,
        synced: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised [C, D], mean [D], biased variance [D])."""
        wide = rows.to(weight.dtype)
        mean = _sum(wide, valid, synced) / count.clamp(min=1)
        variance = _sum((wide - mean).square_(), valid, synced) / count.clamp(min=1)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(rows, weight, valid, count, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        ctx.synced = synced
        normalised = torch.addcmul(bias, wide - mean, scale * weight)
        return normalised.to(rows.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """d row = weight · scale · (g − mean g − x̂ · mean (g · x̂)).

        g is the gradient, x̂ the normalised row; means are over all rows normalised together.
        """
        rows, weight, valid, count, mean, scale = ctx.saved_tensors
        wide = gradient.to(weight.dtype)
        normalised = (rows.to(weight.dtype) - mean) * scale
        of_bias, of_weight = _sum(wide, valid), _sum(wide * normalised, valid)
        means = torch.stack((of_bias, of_weight))
        means = (all_reduce_sum(means) if ctx.synced else means) / count.clamp(min=1)
        of_rows = (wide - means[0]).addcmul_(normalised, means[1], value=-1) * (scale * weight)
        of_rows = torch.where(valid[:, None], of_rows, 0.0).to(rows.dtype)
        return of_rows, of_weight, of_bias, None, None, None, None


def _sum(rows: Tensor, valid: Tensor, synced: bool = False) -> Tensor:
    """Sum [D] of the valid rows, as a product with the mask: it reads `rows` once."""
    with torch.autocast(rows.device.type, enabled=False):
        total = valid.to(rows.dtype) @ rows
    return all_reduce_sum(total) if synced else total


@torch.no_grad()
def _update_running(layer: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update as BatchNorm does, with the unbiased variance; skip fewer than two rows."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    assert layer.momentum is not None
    share = (count > 1).to(mean.dtype) * layer.momentum
    unbiased = variance * count / (count - 1).clamp(min=1)
    layer.running_mean.lerp_(mean, share)
    layer.running_var.lerp_(unbiased, share)
    layer.num_batches_tracked.add_(count > 1)
