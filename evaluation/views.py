"""Both views of images as in training, of any source of images, without a loader."""

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.images import BetonImages, ImageSource
from pipeline.augment import get_backend
from pipeline.views import ViewConfig, ViewParams, sample_views


def make_views(
    images: ImageSource,
    which: np.ndarray,
    seed: int,
    epoch: int,
    config: ViewConfig,
    backend: str = "reference",
    device: torch.device | None = None,
) -> tuple[list[np.ndarray], Tensor, ViewParams]:
    """The views of images `which` int64 [B] in `epoch` of a run with this `seed`.

    Returns the images, each uint8 [H, W, 3], their views float32 [2, B, 3, S, S],
    ImageNet-normalised, on `device` (the CPU), and how these were drawn. Images of a folder are
    numbered in their order, as if packed. Raises UserError for an image that cannot be read.
    """
    pictures = [images.load(i) for i in which.tolist()]
    heights, widths = ([picture.shape[side] for picture in pictures] for side in (0, 1))
    numbers = images.beton.index[which] if isinstance(images, BetonImages) else which
    params = sample_views(seed, epoch, numbers, heights, widths, config)
    canvas = np.zeros((len(which), max(heights), max(widths), 3), np.uint8)
    for padded, picture in zip(canvas, pictures, strict=True):
        padded[: picture.shape[0], : picture.shape[1]] = picture
    sizes = torch.tensor([heights, widths]).T
    views = get_backend(backend).apply(
        torch.from_numpy(canvas), sizes, params, config.size, device or torch.device("cpu"),
        torch.float32,
    )  # fmt: skip
    return pictures, views, params
