"""The whole data path: pixels of the beton reach the model at the right position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from model.alignment import align_to_overlap
from pipeline.beton import Beton
from pipeline.loader import ViewLoader
from pipeline.views import ViewConfig, sample_views
from tests.helpers.betons import write_beton

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
HEIGHT, WIDTH, CELLS, IMAGES = 200, 256, 7, 32


def coordinate_ramp() -> np.ndarray:
    """Red is x, green is y, one level a pixel: uint8 [HEIGHT, WIDTH, 3]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack((x, y, np.zeros_like(x)), axis=2).astype(np.uint8)


@pytest.mark.parametrize("backend", ["reference", "kornia"])
def test_a_coordinate_ramp_returns_to_its_position(tmp_path: Path, backend: str) -> None:
    """Beton → views → inverse augmentation: each aligned cell of both views must show the same
    position in the image, within half a cell. Breaks with any wrong crop, box, flip or order of xy.
    """
    ramps = [coordinate_ramp()] * IMAGES
    beton = Beton(write_beton(tmp_path / "ramp.beton", ramps, mode="raw"))
    config = ViewConfig(size=112, jitter=0, grey=0, blur=(0, 0), solarize=(0, 0))
    device = torch.device("cpu")
    loader = ViewLoader(beton, config, IMAGES, seed=1, backend=backend, device=device)
    batch = next(loader.epoch(0))

    index = batch.index.numpy()
    sides = np.full(IMAGES, HEIGHT), np.full(IMAGES, WIDTH)
    crops = torch.from_numpy(sample_views(1, 0, index, *sides, config).crops)
    corner = torch.maximum(crops[0, :, :2], crops[1, :, :2])  # x, y of the overlap in the image
    extent = torch.minimum(crops[0, :, 2:], crops[1, :, 2:]) - corner
    steps = (torch.arange(CELLS) + 0.5) / CELLS
    x = (corner[:, :1] + extent[:, :1] * steps)[:, None, :].expand(-1, CELLS, -1)
    y = (corner[:, 1:] + extent[:, 1:] * steps)[:, :, None].expand(-1, -1, CELLS)
    half_cells = (crops[..., 2:] - crops[..., :2]) / CELLS / 2  # of each view's map

    assert all((batch.flipped == torch.tensor(f)[:, None]).all(0).any() for f in np.ndindex(2, 2))
    for view, overlap, flipped, half_cell in zip(
        batch.views, batch.overlap, batch.flipped, half_cells, strict=True
    ):
        levels = (view * STD + MEAN) * 255 + 0.5  # a pixel's colour is that of its centre
        shown = align_to_overlap(adaptive_avg_pool2d(levels, CELLS), overlap, flipped)[:, :2]
        distance = (shown - torch.stack((x, y), dim=1)).abs()
        assert (distance <= half_cell[:, :, None, None] + 1).all()  # a level is one pixel
