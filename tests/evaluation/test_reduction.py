"""Standardisation and PCA, compared with their definitions in NumPy."""

import numpy as np
import pytest
import torch

from evaluation.features import Features
from evaluation.reduction import fit_reduction


def skewed(count: int) -> torch.Tensor:
    """[count, 6, 3, 4]: features that depend on each other, far from 0, the last one constant."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.einsum(
        "bdhw,de->behw",
        torch.randn(count, 6, 3, 4, generator=generator),
        torch.randn(6, 6, generator=generator) + 3 * torch.eye(6),
    )
    mixed[:, 5] = 1.1
    return mixed + 500


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("pca", [None, 2])
def test_reduction_is_that_of_all_cells_at_once(
    batch: int, standardise: bool, pca: int | None
) -> None:
    """As scikit-learn's StandardScaler (a constant feature is only centred) and PCA without
    whitening; a direction's sign is free, so that products of cells are compared.
    """
    features = skewed(7)
    reduction = fit_reduction(features.split(batch), standardise=standardise, pca=pca)
    x = features.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    x = x - x.mean(axis=0)
    if standardise:
        x[:, :5] /= x[:, :5].std(axis=0)
    if pca:
        x = x @ np.linalg.svd(x, full_matrices=False)[2][:pca].T
    ours = reduction(features).permute(0, 2, 3, 1).reshape(len(x), -1).numpy()
    assert ours.shape == x.shape
    np.testing.assert_allclose(ours @ ours.T, x @ x.T, rtol=1e-3, atol=1e-3 * np.abs(x @ x.T).max())


def test_reduced_features_are_compared_by_distance() -> None:
    """Their directions are those from the mean, which say little about a cell."""
    reduction = fit_reduction([skewed(2)], standardise=True, pca=3)
    reduced = reduction.of(Features("x", lambda images: images))
    assert reduced(skewed(2)).shape == (2, 3, 3, 4)
    assert not reduced.cosine
    with pytest.raises(ValueError, match="--pca 9: there are only 6 features"):
        fit_reduction([skewed(2)], standardise=True, pca=9)
