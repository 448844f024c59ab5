"""Images for evaluation: sources of images, and the centre crop that every image is reduced to.

Letters: N images, H W a stored image's height and width, R the side of an evaluated image, in
pixels.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.folders import as_url, aside, find_images, is_folder, say_found
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.images import load_rgb

TRAINING_SIDE, EVALUATION_SIDE, STRIDE = 224, 320, 32
DECODE_THREADS = 4
"""Threads that read images while the network runs on earlier ones."""


def evaluation_size(training_size: int) -> int:
    """Side R in pixels at which a model trained on `training_size`-pixel views is evaluated.

    320 for 224 (the COCO-Stuff protocol). Other sizes keep this ratio, rounded to whole cells of
    the encoder.
    """
    cells = round(training_size * EVALUATION_SIDE / TRAINING_SIDE / STRIDE)
    return STRIDE * max(cells, 1)


class ImageSource(Protocol):
    """N images in a fixed order."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> np.ndarray:
        """Image `i` as uint8 [H, W, 3] RGB."""


class BetonImages:
    """The images of a beton. Raises UserError where `Beton` does."""

    def __init__(self, path: Path) -> None:
        self.beton = Beton(path)

    def __len__(self) -> int:
        return len(self.beton)

    def load(self, i: int) -> np.ndarray:
        return self.beton.decode(i)


class FolderImages:
    """The images under a folder, sorted by path. Raises UserError if there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths, self.left = find_images(folder)
        """`left`: how many files and folders were left aside, by reason."""
        if not self.paths:
            raise UserError(
                f"{folder}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
                f"{aside(self.left)}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> np.ndarray:
        return load_rgb(self.paths[i])


def open_images(path: Path) -> ImageSource:
    """The images of a .beton file, or of a folder, whose number is printed. Raises UserError."""
    if not is_folder(path) and not as_url(str(path)):
        return BetonImages(path)
    images = FolderImages(path)
    say_found(len(images), path, images.left)
    return images


def spread(count: int, at_most: int | None) -> np.ndarray:
    """int64 [M], M ≤ `at_most`: image numbers from 0 … count-1 at even distances, all if None.

    A beton may be sorted by class, so its first images may all show the same class.
    """
    taken = count if at_most is None else min(count, at_most)
    return np.arange(taken, dtype=np.int64) * count // taken


def centre_square(pixels: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """[H, W] or [H, W, 3] → [R, R] or [R, R, 3]: shorter side to R = `size`, then centre crop.

    BILINEAR is antialiased: the filter widens with the reduction. NEAREST keeps class ids.
    """
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    # The longer side rounds down, as in torchvision's Resize: crops then fall on the same pixels.
    target = (width * size // shorter, height * size // shorter)
    left, top = (round((side - size) / 2) for side in target)
    image = Image.fromarray(pixels).resize(target, resample)
    return np.asarray(image.crop((left, top, left + size, top + size)))
