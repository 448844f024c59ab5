"""Random crops of labelled images, as published probes learn from.

Letters: H W a stored image's height and width, R the side of the square, in pixels.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torchvision.transforms import functional as colours

from evaluation.datasets.labelled_squares import LabelledSquares


@dataclass(frozen=True)
class Recipe:
    """What is random about a crop."""

    scale: tuple[float, float]
    """Least and largest share of the image's area."""
    mirror: float = 0.0
    """Probability of the mirror image."""
    jitter: float = 0.0
    """Largest change of brightness, contrast, saturation and hue, each of half of the images."""


LEOPART = Recipe(scale=(0.8, 1.0), mirror=0.5)
"""Of the linear classifiers of Leopart and NeCo."""
HUMMINGBIRD = Recipe(scale=(0.5, 2.0), jitter=0.1)
"""Of the memory of open-hummingbird-eval. A crop larger than the image falls back to the whole one,
or to its largest part of an allowed shape."""


@dataclass(frozen=True)
class Crop:
    """A box in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, …] → [height, width, …]."""
        part = pixels[self.top : self.top + self.height, self.left : self.left + self.width]
        return np.ascontiguousarray(part[:, ::-1] if self.mirrored else part)


def draw_crop(generator: np.random.Generator, height: int, width: int, recipe: Recipe) -> Crop:
    """torchvision's RandomResizedCrop: an area and a shape from 3:4 to 4:3, up to ten tries; else
    the largest box of an allowed shape at the centre.
    """
    narrow, wide = 3 / 4, 4 / 3
    mirrored = bool(generator.random() < recipe.mirror)
    for _ in range(10):
        area = height * width * generator.uniform(*recipe.scale)
        shape = math.exp(generator.uniform(math.log(narrow), math.log(wide)))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            top = int(generator.integers(height - down + 1))
            left = int(generator.integers(width - across + 1))
            return Crop(top, left, down, across, mirrored)
    down, across = height, width
    if width < narrow * height:
        down = round(width / narrow)
    elif width > wide * height:
        across = round(height * wide)
    return Crop((height - down) // 2, (width - across) // 2, down, across, mirrored)


def jittered(pixels: np.ndarray, generator: np.random.Generator, most: float) -> np.ndarray:
    """uint8 [H, W, 3] of the same scene in other colours, changed by Pillow as torchvision does."""
    image = Image.fromarray(pixels)
    for change in (colours.adjust_brightness, colours.adjust_contrast, colours.adjust_saturation):
        if generator.random() < 0.5:
            image = change(image, generator.uniform(1 - most, 1 + most))
    if generator.random() < 0.5:
        image = colours.adjust_hue(image, generator.uniform(-most, most))
    return np.asarray(image)


@dataclass(frozen=True)
class RandomSquares(LabelledSquares):
    """Random crops of labelled images, squashed to squares. They depend on `seed`, `epoch` and the
    image's number alone.
    """

    recipe: Recipe = field(kw_only=True)
    seed: int = field(kw_only=True)
    epoch: int = 0

    def square(self, i: int, pixels: np.ndarray) -> np.ndarray:
        crop = self._crop(i, pixels)
        if self.recipe.jitter:
            generator = np.random.default_rng((self.seed, self.epoch, i, 1))
            pixels = jittered(pixels, generator, self.recipe.jitter)
        return super().square(i, crop.of(pixels))

    def square_labels(self, i: int, classes: np.ndarray) -> np.ndarray:
        return super().square_labels(i, self._crop(i, classes).of(classes))

    def _crop(self, i: int, pixels: np.ndarray) -> Crop:
        generator = np.random.default_rng((self.seed, self.epoch, i))
        height, width = pixels.shape[:2]
        return draw_crop(generator, height, width, self.recipe)

    def of_epoch(self, epoch: int) -> "RandomSquares":
        """Other crops of the same images."""
        return replace(self, epoch=epoch)
