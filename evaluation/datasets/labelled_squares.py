"""Batches of labelled images, each cropped or squashed to a square.

Letters: B images, R the side of an evaluated image, in pixels.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.squares import SquareImages, Squares


@dataclass(frozen=True)
class LabelledSquares(SquareImages):
    """Labelled images to read in batches, as squares of R = `size` pixels."""

    images: LabelledImages

    def square_labels(self, i: int, classes: np.ndarray) -> np.ndarray:
        """Label map `i`, uint8 [H, W], as [R, R]."""
        return self.fit.labels(classes, self.size)

    def labels(self, batch: Squares) -> np.ndarray:
        """uint8 [B, R, R]: the label maps of a batch, cropped or squashed like its images, with
        nearest neighbour. Raises UserError.
        """
        numbers = zip(batch.index.tolist(), batch.shape, strict=True)
        return np.stack(
            [self.square_labels(i, self.images.labels(i, *shape)) for i, shape in numbers]
        )
