"""Linear maps of features, and the whitening that unlabelled cells call for.

Letters: B images, D features, P features kept, h w cells.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.precision import full_precision

RIDGE = 1e-3
"""Share of the largest variance that whitening adds to all: directions of noise stay small."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of cells, in float64."""

    count: int
    mean: Tensor
    """[D]"""
    covariance: Tensor
    """[D, D], of the population"""


@dataclass(frozen=True)
class Reduction:
    """x → (x - mean) · matrix."""

    mean: Tensor
    """float32 [D]"""
    matrix: Tensor
    """float32 [D, P]"""

    @full_precision
    def __call__(self, features: Tensor) -> Tensor:
        """[B, D, h, w] → [B, P, h, w]."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("bdhw,dp->bphw", centred, self.matrix)


def moments(batches: Iterable[Tensor]) -> Moments:
    """Of features [B, D, h, w], batch by batch. Raises ValueError if there are no cells."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        cells = features.permute(0, 2, 3, 1).flatten(0, 2).double()
        if not count:  # near the mean, so that subtracting it later loses nothing
            origin = cells.mean(dim=0)
        cells = cells - origin
        count += len(cells)
        total = total.to(cells) + cells.sum(dim=0)
        products = products.to(cells) + cells.T @ cells
    if not count:
        raise ValueError("no cells to learn from")
    covariance = products / count - torch.outer(total, total) / count**2
    return Moments(count, origin + total / count, covariance)


def fit_whitening(batches: Iterable[Tensor], power: float) -> Reduction:
    """`whitening` of features [B, D, h, w], batch by batch. Raises ValueError."""
    return whitening(moments(batches), power)


def whitening(of_cells: Moments, power: float) -> Reduction:
    """x → (x - mean) · (covariance + `RIDGE` · its largest eigenvalue)^-`power`, in float64. The
    directions stay those of the features (ZCA).

    With a power of 1/2 the features are uncorrelated and of variance 1, ridge aside; with less,
    directions of large variance still count more. Raises ValueError for fewer cells than features.
    """
    dim = len(of_cells.mean)
    require_whitening(of_cells.count, dim)
    values, directions = torch.linalg.eigh(of_cells.covariance)
    if not values[-1] > 0:
        raise ValueError("--whiten: all cells have the same features")
    scale = (values.clamp_min(0) + RIDGE * values[-1]) ** -power
    return Reduction(of_cells.mean.float(), (directions * scale @ directions.T).float())


def require_whitening(cells: int, dim: int) -> None:
    if cells < dim:
        raise ValueError(f"--whiten: {cells} cells are fewer than {dim} features")
