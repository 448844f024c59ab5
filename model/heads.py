"""Projector and predictor: the same three-layer MLP, applied to cells or to slots."""

from collections.abc import Callable
from functools import partial

from torch import nn


def build_projector(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    """MLP applied to every cell: [B, dim_in, H, W] -> [B, dim_out, H, W]."""
    return _mlp(partial(nn.Conv2d, kernel_size=1), nn.BatchNorm2d, dim_in, dim_hidden, dim_out)


def build_norm(dim: int) -> nn.BatchNorm2d:
    """In place of a projector: each channel of [B, dim, H, W] with mean 0 and variance 1."""
    return nn.BatchNorm2d(dim, affine=False)


def build_predictor(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    """MLP applied to every slot: [N, dim_in] -> [N, dim_out]."""
    return _mlp(nn.Linear, nn.BatchNorm1d, dim_in, dim_hidden, dim_out)


def _mlp(
    linear: Callable[[int, int], nn.Conv2d | nn.Linear],
    norm: Callable[[int], nn.Module],
    dim_in: int,
    dim_hidden: int,
    dim_out: int,
) -> nn.Sequential:
    layers = (
        linear(dim_in, dim_hidden),
        linear(dim_hidden, dim_hidden),
        linear(dim_hidden, dim_out),
    )
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    first, second, last = layers
    return nn.Sequential(
        first, norm(dim_hidden), nn.GELU(), second, norm(dim_hidden), nn.GELU(), last
    )
