"""The teacher's grouping of whole images, streamed batch by batch.

Letters: B images, K prototypes, D features, H W cells, R the side of an evaluated image in pixels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.datasets.images import ImageSource, centre_square
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD

DECODE_THREADS = 4
"""That read images while the network looks at others."""
UPSAMPLED_FLOATS = 2**24
"""Floats of upsampled scores held at once: 64 MiB, whatever K and R are."""


class Segmenter(Protocol):
    """What evaluation needs of a network; `model.SlotCon` is one."""

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, R, R] → cosine scores [B, K, H, W], features [B, D, H, W]."""


@dataclass(frozen=True)
class Squares:
    """B images cut to evaluation's size, on the host."""

    index: np.ndarray
    """int64 [B], their numbers in the source."""
    shape: list[tuple[int, int]]
    """Stored (height, width) of each."""
    pixels: np.ndarray
    """uint8 [B, R, R, 3]."""

    def normalised(self, device: torch.device) -> Tensor:
        """float32 [B, 3, R, R] with ImageNet's mean and deviation, channels_last, on `device`."""
        return normalise(torch.from_numpy(self.pixels).to(device))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W], channels_last, with ImageNet's mean and
    deviation.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_STD, device=pixels.device)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Segmented:
    """B images and what the network makes of them, on the network's device."""

    squares: Squares
    scores: Tensor
    """[B, K, H, W], cosine of prototype and cell."""
    features: Tensor
    """[B, D, H, W], output of the projector."""


def square_batches(
    images: ImageSource,
    size: int,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Iterator[Squares]:
    """The images (all, or those of `indices` int64 [M]) in order, cut to R = `size`, a batch at a
    time.

    `progress` is the label of the progress bar; None shows none. Raises UserError for an image that
    cannot be read.
    """
    indices = np.arange(len(images)) if indices is None else indices

    def load(i: int) -> tuple[tuple[int, int], np.ndarray]:
        pixels = images.load(i)
        return pixels.shape[:2], centre_square(pixels, size, Image.Resampling.BILINEAR)

    bar = tqdm(total=len(indices), desc=progress, unit="image", disable=progress is None)
    with bar, ThreadPoolExecutor(DECODE_THREADS) as pool:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            shapes, pixels = zip(*pool.map(load, batch.tolist()), strict=True)
            yield Squares(batch, list(shapes), np.stack(pixels))
            bar.update(len(batch))


def segment_images(
    network: Segmenter,
    images: ImageSource,
    size: int,
    *,
    device: torch.device,
    indices: np.ndarray | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Iterator[Segmented]:
    """Segment images batch by batch, one in memory at a time; arguments as in `square_batches`."""
    for squares in square_batches(
        images, size, indices=indices, batch_size=batch_size, progress=progress
    ):
        with torch.inference_mode():
            scores, features = network.segment(squares.normalised(device))
        yield Segmented(squares, scores.float(), features.float())


def assign(scores: Tensor, size: int | tuple[int, int], align_corners: bool = False) -> Tensor:
    """Scores [B, K, h, w] → int64 [B, H, W]: the prototype that wins each pixel, scores upsampled
    bilinearly; `size` is R = H = W, or (H, W).

    A few prototypes are upsampled at a time and compared with the best so far: all of them at once
    would need 840 MB an image for K = 2048 at R = 320.
    """
    height, width = (size, size) if isinstance(size, int) else size
    step = max(1, UPSAMPLED_FLOATS // (len(scores) * height * width))
    best = scores.new_full((len(scores), height, width), -torch.inf)
    winner = torch.zeros(best.shape, dtype=torch.int64, device=scores.device)
    for first in range(0, scores.shape[1], step):
        some = F.interpolate(
            scores[:, first : first + step],
            (height, width),
            mode="bilinear",
            align_corners=align_corners,
        )
        value, index = some.max(dim=1)
        winner = torch.where(value > best, index + first, winner)
        best = torch.maximum(best, value)
    return winner
