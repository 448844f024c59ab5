"""Projector and predictor: MLPs, applied to cells or to slots."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import nn


def build_projector(
    dim_in: int, dim_hidden: int, dim_out: int, norms: bool = True
) -> nn.Sequential:
    """MLP of three layers, applied to every cell: [B, dim_in, H, W] -> [B, dim_out, H, W]. `norms`:
    with BatchNorms."""
    norm = nn.BatchNorm2d if norms else None
    return _mlp(partial(nn.Conv2d, kernel_size=1), norm, (dim_in, dim_hidden, dim_hidden, dim_out))


def build_norm(dim: int) -> nn.BatchNorm2d:
    """In place of a projector: each channel of [B, dim, H, W] with mean 0 and variance 1."""
    return nn.BatchNorm2d(dim, affine=False)


def build_predictor(
    dim_in: int, dim_hidden: int, dim_out: int, norms: bool = True
) -> nn.Sequential:
    """MLP applied to every slot: [N, dim_in] -> [N, dim_out]. As the authors have it: three layers
    with BatchNorms, two without.
    """
    if norms:
        return _mlp(nn.Linear, nn.BatchNorm1d, (dim_in, dim_hidden, dim_hidden, dim_out))
    return _mlp(nn.Linear, None, (dim_in, dim_hidden, dim_out))


def _mlp(
    linear: Callable[[int, int], nn.Conv2d | nn.Linear],
    norm: Callable[[int], nn.Module] | None,
    dims: Sequence[int],
) -> nn.Sequential:
    layers = [linear(before, after) for before, after in pairwise(dims)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    parts: list[nn.Module] = [layers[0]]
    for dim, layer in zip(dims[1:], layers[1:], strict=False):
        between = [] if norm is None else [norm(dim)]
        parts += [*between, nn.GELU(), layer]
    return nn.Sequential(*parts)
