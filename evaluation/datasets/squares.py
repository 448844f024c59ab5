"""Batches of images, each scaled to a square.

Letters: B images, H W a stored image's height and width, R the side of an evaluated image, in
pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.datasets.images import DECODE_THREADS, FITS, Fit, ImageSource
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Squares:
    """B images of R × R pixels, in host memory."""

    index: np.ndarray
    """int64 [B], their numbers in the source."""
    shape: list[tuple[int, int]]
    """Stored (height, width) of each."""
    pixels: np.ndarray
    """uint8 [B, R, R, 3]."""
    std: Sequence[float] = IMAGENET_STD
    """As in `SquareImages`."""

    def normalised(self, device: torch.device) -> Tensor:
        """float32 [B, 3, R, R] with ImageNet's mean and `std`, channels_last, on `device`."""
        return normalise(torch.from_numpy(self.pixels).to(device), self.std)


def normalise(pixels: Tensor, deviation: Sequence[float] = IMAGENET_STD) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W], channels_last, with ImageNet's mean and a
    deviation by channel.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(deviation, device=pixels.device)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class SquareImages:
    """Images to read in batches, as squares of R = `size` pixels."""

    images: ImageSource
    size: int
    device: torch.device
    """Where networks run on these images."""
    batch_size: int = 8
    fit: Fit = FITS["crop"]
    std: Sequence[float] = IMAGENET_STD
    """Of the three channels, by which networks' inputs are divided."""

    def square(self, i: int, pixels: np.ndarray) -> np.ndarray:
        """Image `i` as uint8 [R, R, 3]."""
        return self.fit.image(pixels, self.size)

    def first(self) -> Squares:
        """The first image, which says how large all features will be. Raises UserError."""
        return next(self.batches(indices=np.arange(1)))

    def batches(
        self, progress: str | None = None, indices: np.ndarray | None = None
    ) -> Iterator[Squares]:
        """Yield the images (all, or `indices` int64 [M]) in order, one batch in memory at a time.

        `progress` is the label of the progress bar; None shows no bar. Raises UserError for an
        image that cannot be read.
        """
        indices = np.arange(len(self.images)) if indices is None else indices

        def load(i: int) -> tuple[tuple[int, int], np.ndarray]:
            pixels = self.images.load(i)
            return pixels.shape[:2], self.square(i, pixels)

        bar = tqdm(total=len(indices), desc=progress, unit="image", disable=progress is None)
        with bar, ThreadPoolExecutor(DECODE_THREADS) as pool:
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                shapes, pixels = zip(*pool.map(load, batch.tolist()), strict=True)
                yield Squares(batch, list(shapes), np.stack(pixels), self.std)
                bar.update(len(batch))
