"""Features and label maps of the same images, streamed batch by batch.

Letters: B images, D features, h w cells, R the side of an evaluated image in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.layouts import LabelledImages, square_labels
from evaluation.features import Features
from evaluation.segment import Squares, square_batches


@dataclass(frozen=True)
class LabelledFeatures:
    """B images, what the network makes of them, and what they show."""

    squares: Squares
    features: Tensor
    """float32 [B, D, h, w], on the network's device."""
    labels: np.ndarray
    """uint8 [B, R, R], void as 255."""


def labelled_features(
    network: Features,
    data: LabelledImages,
    size: int,
    *,
    device: torch.device,
    indices: np.ndarray | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Iterator[LabelledFeatures]:
    """Go through `data` in order (all, or `indices` int64 [M]), one batch in memory at a time.

    `progress` is the label of the progress bar. Raises UserError for a bad image or label map.
    """
    for squares in square_batches(
        data, size, indices=indices, batch_size=batch_size, progress=progress
    ):
        with torch.inference_mode():
            features = network(squares.normalised(device)).float()
        yield LabelledFeatures(squares, features, square_labels(data, squares, size))
