"""Linear maps of features, fitted to unlabelled cells: standardisation, PCA and whitening.

Letters: B images, D features, P features kept, h w cells.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.squares import SquareImages
from evaluation.features import Features
from model.precision import full_precision
from pipeline.errors import about

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

    def of(self, features: Features) -> Features:
        """`features` reduced; they are compared by distance: their lengths mean something."""
        return replace(features, function=lambda images: self(features(images)), cosine=False)


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


def fit_reduction(batches: Iterable[Tensor], *, standardise: bool, pca: int | None) -> Reduction:
    """Fit to features [B, D, h, w], batch by batch, in float64.

    `standardise` divides each feature by its deviation (of the population; a constant feature is
    left alone), as scikit-learn's StandardScaler. `pca` then keeps the P directions of largest
    variance, without whitening. Raises ValueError if there are no cells or fewer than P features.
    """
    of_cells = moments(batches)
    _require_components(pca, len(of_cells.mean))
    deviation = of_cells.covariance.diagonal().clamp_min(0).sqrt()
    varies = deviation > 1e-9 * of_cells.mean.abs()  # less is rounding
    scale = torch.where(varies & standardise, deviation, 1.0)
    matrix = (1 / scale).diag()
    if pca is not None:
        _, directions = torch.linalg.eigh(of_cells.covariance / torch.outer(scale, scale))
        matrix = matrix @ directions.flip(1)[:, :pca]
    return Reduction(of_cells.mean.float(), matrix.float())


def fit_whitening(batches: Iterable[Tensor], power: float) -> Reduction:
    """x → (x - mean) · (covariance + `RIDGE` · its largest eigenvalue)^-`power`, fitted to features
    [B, D, h, w], batch by batch, in float64. The directions stay those of the features (ZCA).

    With a power of 1/2 the features are uncorrelated and of variance 1, ridge aside; with less,
    directions of large variance still count more. Raises ValueError for fewer cells than features.
    """
    of_cells = moments(batches)
    dim = len(of_cells.mean)
    _require_whitening(of_cells.count, dim)
    values, directions = torch.linalg.eigh(of_cells.covariance)
    if not values[-1] > 0:
        raise ValueError("--whiten: all cells have the same features")
    scale = (values.clamp_min(0) + RIDGE * values[-1]) ** -power
    return Reduction(of_cells.mean.float(), (directions * scale @ directions.T).float())


def _require_whitening(cells: int, dim: int) -> None:
    if cells < dim:
        raise ValueError(f"--whiten: {cells} cells are fewer than {dim} features")


def _require_components(pca: int | None, dim: int) -> None:
    if pca is not None and pca > dim:
        raise ValueError(f"--pca {pca}: there are only {dim} features")


def require_cells(
    name: str,
    first: Tensor,
    num_images: int,
    *,
    whiten: float | None,
    pca: int | None = None,
    clusters: int | None = None,
) -> None:
    """Refuse what the cells or features are too few for. The features [1, D, h, w] of the `first`
    image say how many there are, so that nobody waits for the others. Raises UserError.
    """
    _, dim, height, width = first.shape
    cells = num_images * height * width
    with about(name):
        if whiten is not None:
            _require_whitening(cells, dim)
        _require_components(pca, dim)
        if clusters is not None and cells < clusters:
            raise ValueError(f"{cells} cells are fewer than {clusters} clusters")


def whitened(features: Features, squares: SquareImages, power: float | None) -> Features:
    """`features`, whitened as `fit_whitening` learns from the images; themselves without `power`.
    What compares directions still does: those from the mean. Raises UserError.
    """
    if power is None:
        return features
    batches = squares.batches(f"{features.name}: whitening")
    maps = (features(batch.normalised(squares.device)) for batch in batches)
    with about(features.name):
        whiten = fit_whitening(maps, power)
    name = f"{features.name}, whitened"
    return replace(features, name=name, function=lambda images: whiten(features(images)))


def reduced(
    features: Features,
    squares: SquareImages,
    *,
    standardise: bool,
    pca: int | None = None,
    indices: np.ndarray | None = None,
) -> Features:
    """`features`, standardised and projected as `fit_reduction` learns from the images: all, or
    `indices` int64 [M]. Raises UserError where it raises ValueError.
    """
    batches = squares.batches(f"{features.name}: mean and variance", indices)
    maps = (features(batch.normalised(squares.device)) for batch in batches)
    with about(features.name):
        return fit_reduction(maps, standardise=standardise, pca=pca).of(features)
