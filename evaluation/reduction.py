"""Linear maps of features, fitted to unlabelled cells: standardisation, PCA and whitening.

Letters: B images, D features, P features kept, h w cells.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.squares import SquareImages
from evaluation.features import Features
from model.reduction import Reduction, fit_whitening, moments, require_whitening
from pipeline.errors import about


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


def by_distance(reduction: Reduction, features: Features) -> Features:
    """`features` reduced; they are compared by distance: their lengths mean something."""
    return replace(features, function=lambda images: reduction(features(images)), cosine=False)


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
            require_whitening(cells, dim)
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
        fitted = fit_reduction(maps, standardise=standardise, pca=pca)
    return by_distance(fitted, features)
