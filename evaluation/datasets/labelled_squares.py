"""Batches of labelled images, each scaled and cropped to a square.

Letters: B images, R the side of an evaluated image, in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from evaluation.datasets.images import centre_square
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.squares import SquareImages, Squares


@dataclass(frozen=True)
class LabelledSquares(SquareImages):
    """Labelled images to read in batches, as squares of R = `size` pixels."""

    images: LabelledImages

    def labels(self, batch: Squares) -> np.ndarray:
        """uint8 [B, R, R]: the label maps of a batch, cropped like its images, with nearest
        neighbour. Raises UserError.
        """
        numbers = zip(batch.index.tolist(), batch.shape, strict=True)
        maps = (self.images.labels(i, *shape) for i, shape in numbers)
        return np.stack([centre_square(m, self.size, Image.Resampling.NEAREST) for m in maps])
