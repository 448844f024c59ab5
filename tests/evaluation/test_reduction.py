"""Standardisation, PCA and whitening, compared with their definitions in NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.datasets.images import FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.features import Features, block_means
from evaluation.reduction import by_distance, fit_reduction, reduced, whitened
from model.reduction import fit_whitening
from pipeline.errors import UserError
from tests.helpers.coloured import write_scenes


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
    reduced = by_distance(reduction, Features("x", lambda images: images))
    assert reduced(skewed(2)).shape == (2, 3, 3, 4)
    assert not reduced.cosine
    with pytest.raises(ValueError, match="--pca 9: there are only 6 features"):
        fit_reduction([skewed(2)], standardise=True, pca=9)


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("batch", [1, 7])
def test_whitening_by_svd(power: float, batch: int) -> None:
    """x = U S Vᵀ, centred: the covariance is V S²/n Vᵀ, so its power needs only S and V. The
    constant feature, of variance 0, stays 0.
    """
    features = skewed(7)
    found = fit_whitening(features.split(batch), power)(features)
    x = features.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    x = x - x.mean(axis=0)
    _, s, vt = np.linalg.svd(x, full_matrices=True)
    variance = s**2 / len(x)
    expected = x @ vt.T @ np.diag((variance + 1e-3 * variance[0]) ** -power) @ vt
    ours = found.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    if power == 0.5:
        variances = ours[:, :5].var(axis=0)
        assert variances.max() < 1.001 and variances.min() > 0.5


def test_too_few_cells_to_whiten(tmp_path: Path) -> None:
    """The directions that no cell shows would be scaled up as if they were noise. One line."""
    with pytest.raises(ValueError, match="--whiten: 4 cells are fewer than 6 features"):
        fit_whitening([skewed(1)[:, :, :2, :2]], 0.25)
    with pytest.raises(ValueError, match="all cells have the same features"):
        fit_whitening([torch.ones(4, 3, 2, 2)], 0.25)
    squares = SquareImages(
        FolderImages(write_scenes(tmp_path, [np.array([[0]])])[0]), 8, torch.device("cpu")
    )
    with pytest.raises(UserError, match="pixels: --whiten: 1 cells are fewer than 3 features"):
        whitened(Features("pixels", block_means), squares, 0.25)


def test_an_error_names_its_features_once(tmp_path: Path) -> None:
    """Without it too large a --pca would be a traceback, and features that are not finite would
    come with their name twice.
    """
    squares = SquareImages(
        FolderImages(write_scenes(tmp_path, [np.array([[0]])])[0]), 8, torch.device("cpu")
    )
    with pytest.raises(UserError, match=r"^x: --pca 9: there are only 3 features"):
        reduced(Features("x", block_means), squares, standardise=True, pca=9)
    broken = Features("x", lambda images: block_means(images) / 0)
    for read in (
        lambda: whitened(broken, squares, 0.25),
        lambda: reduced(broken, squares, pca=1, standardise=False),
    ):
        with pytest.raises(UserError, match=r"^x: features with NaN"):
            read()


def test_whitened_features_keep_their_measure(tmp_path: Path) -> None:
    """k-NN and k-means compare whitened features as they compare others; the name says what they
    are, so that two tables are not taken for one.
    """
    folder = write_scenes(tmp_path, [np.array([[0, 1], [2, 1]])])[0]
    squares = SquareImages(FolderImages(folder), 64, torch.device("cpu"))
    plain = Features("x", block_means, cosine=True, stage="3+4")
    result = whitened(plain, squares, 0.5)
    assert (result.name, result.cosine, result.stage) == ("x, whitened", True, "3+4")
    assert whitened(plain, squares, None) is plain
    everything = next(squares.batches()).normalised(squares.device)
    assert result(everything).mean(dim=(0, 2, 3)).abs().max() < 1e-5
