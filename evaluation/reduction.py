"""Linear maps of features, fitted to unlabelled cells: standardisation and PCA.

Letters: B images, D features, P features kept, h w cells.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.squares import SquareImages
from evaluation.features import Features
from model.precision import full_precision


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

    def of(self, features: Features) -> Features:
        """`features` reduced; they are compared by distance: their lengths mean something."""
        return Features(features.name, lambda images: self(features(images)), cosine=False)


def fit_reduction(batches: Iterable[Tensor], *, standardise: bool, pca: int | None) -> Reduction:
    """Fit to features [B, D, h, w], batch by batch, in float64.

    `standardise` divides each feature by its deviation (of the population; a constant feature is
    left alone), as scikit-learn's StandardScaler. `pca` then keeps the P directions of largest
    variance, without whitening. Raises ValueError if there are no cells or fewer than P features.
    """
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
        raise ValueError("no cells to standardise")
    if pca is not None and pca > len(origin):
        raise ValueError(f"--pca {pca}: there are only {len(origin)} features")
    covariance = products / count - torch.outer(total, total) / count**2
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    varies = deviation > 1e-9 * origin.abs()  # less is rounding
    scale = torch.where(varies & standardise, deviation, 1.0)
    matrix = (1 / scale).diag()
    if pca is not None:
        _, directions = torch.linalg.eigh(covariance / torch.outer(scale, scale))
        matrix = matrix @ directions.flip(1)[:, :pca]
    return Reduction((origin + total / count).float(), matrix.float())


def reduced(
    features: Features,
    squares: SquareImages,
    *,
    standardise: bool,
    pca: int | None = None,
    indices: np.ndarray | None = None,
) -> Features:
    """`features`, standardised and projected as `fit_reduction` learns from the images: all, or
    `indices` int64 [M]. Raises ValueError as it does.
    """
    batches = squares.batches(f"{features.name}: mean and variance", indices)
    maps = (features(batch.normalised(squares.device)) for batch in batches)
    return fit_reduction(maps, standardise=standardise, pca=pca).of(features)
