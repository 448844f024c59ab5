"""Images for evaluation: sources of images, and how every image becomes a square.

Letters: N images, H W a stored image's height and width, R the side of an evaluated image, in
pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError, printable
from pipeline.folders import as_url, aside, find_images, is_file, is_folder, say_found
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.images import load_rgb
from pipeline.lines import text_lines
from pipeline.manifest import Manifest, manifest_path

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


class NamedImages(ImageSource, Protocol):
    """Images that have names."""

    def names(self) -> list[str]:
        """The name of each image, as its source has it."""


class BetonImages:
    """The images of a beton. Raises UserError where `Beton` does."""

    def __init__(self, path: Path) -> None:
        self.beton = Beton(path)

    def __len__(self) -> int:
        return len(self.beton)

    def load(self, i: int) -> np.ndarray:
        return self.beton.decode(i)

    def names(self) -> list[str]:
        """By the manifest beside the beton; without one, their numbers. Raises UserError if the
        manifest is damaged.
        """
        if not manifest_path(self.beton.path).exists():
            return [f"record {i}" for i in range(len(self))]
        names = [record.name for record in Manifest.beside(self.beton.path).records()]
        if len(names) != len(self):
            raise UserError(f"{manifest_path(self.beton.path)}: belongs to another beton")
        return names


class FileImages:
    """The images in these files, which have `shown` names."""

    def __init__(self, paths: Sequence[Path], shown: Sequence[str]) -> None:
        self.paths, self._shown = paths, shown

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> np.ndarray:
        return load_rgb(self.paths[i])

    def names(self) -> list[str]:
        return list(self._shown)


class FolderImages(FileImages):
    """The images under a folder, sorted by path. Raises UserError if there are none."""

    def __init__(self, folder: Path) -> None:
        paths, self.left = find_images(folder)
        """`left`: how many files and folders were left aside, by reason."""
        if not paths:
            raise UserError(
                f"{folder}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
                f"{aside(self.left)}"
            )
        super().__init__(paths, [path.relative_to(folder).as_posix() for path in paths])


def listed_images(path: Path) -> FileImages:
    """The images in a text file with a path on each line, relative to its folder. Raises UserError
    if it names none, or one that is no file.
    """
    lines = [line.rstrip("\r\n") for line in text_lines(path, "expected a path on each line")]
    names = [name for name in lines if name.strip()]
    if not names:
        raise UserError(f"{path}: names no files")
    for number, name in enumerate(lines, 1):
        if name.strip() and not is_file(path.parent / name):
            raise UserError(f"{path}: line {number}: there is no file {printable(name[:200])}")
    return FileImages([path.parent / name for name in names], names)


def open_images(path: Path) -> NamedImages:
    """The images of a .beton file, of a list (.txt), or of a folder, whose number is printed.
    Raises UserError.
    """
    if not is_folder(path) and not as_url(str(path)):
        return listed_images(path) if path.suffix.lower() == ".txt" else BetonImages(path)
    images = FolderImages(path)
    say_found(len(images), path, images.left)
    return images


def spread(count: int, at_most: int | None) -> np.ndarray:
    """int64 [M], M ≤ `at_most`: image numbers from 0 … count-1 at even distances, all if None.

    A beton may be sorted by class, so its first images may all show the same class.
    """
    taken = count if at_most is None else min(count, at_most)
    return np.arange(taken, dtype=np.int64) * count // taken


@dataclass(frozen=True)
class Fit:
    """How an image and its label map become squares of R × R pixels."""

    whole: bool = False
    """Scale height and width apart. Otherwise scale the shorter side, and crop at the centre."""
    filter: Image.Resampling = Image.Resampling.BILINEAR
    """Of the image. Bilinear and bicubic are antialiased: the filter widens with the reduction."""
    torch_labels: bool = False
    """Take the label's pixels that torch's nearest neighbour takes, instead of Pillow's."""

    def image(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """[H, W, 3] → [R, R, 3]."""
        if self.whole:
            return np.asarray(Image.fromarray(pixels).resize((size, size), self.filter))
        return centre_square(pixels, size, self.filter)

    def labels(self, classes: np.ndarray, size: int) -> np.ndarray:
        """[H, W] → [R, R]."""
        if self.torch_labels:
            return torch_nearest(classes, size)
        nearest = Image.Resampling.NEAREST
        if self.whole:
            return np.asarray(Image.fromarray(classes).resize((size, size), nearest))
        return centre_square(classes, size, nearest)


FITS = {
    "crop": Fit(),
    "crop-nearest": Fit(filter=Image.Resampling.NEAREST),
    "square": Fit(whole=True),
    "square-torch": Fit(whole=True, torch_labels=True),
    "square-bicubic": Fit(whole=True, filter=Image.Resampling.BICUBIC),
}
"""By name on the command line. PiCIE crops. STEGO and CAUSE scale the image, too, by nearest
neighbour. Leopart and NeCo squash it, open-hummingbird-eval with torch's labels, CAPI by bicubic
interpolation."""
FIT_HELP = (
    "crop: scale the shorter side, crop at the centre; square: squash the whole image. "
    "crop-nearest scales the image by nearest neighbour, square-bicubic by bicubic interpolation; "
    "square-torch takes the label's pixels that torch's nearest neighbour takes (crop)"
)


def torch_nearest(classes: np.ndarray, size: int) -> np.ndarray:
    """[…, H, W] → […, R, R]: the pixels that torch's nearest neighbour takes. It rounds down, in
    float32, and Pillow takes the pixel under the centre.
    """

    def taken(side: int) -> np.ndarray:
        places = np.arange(size, dtype=np.float32) * np.float32(np.float32(side) / size)
        return places.astype(np.int64).clip(max=side - 1)

    return classes[..., taken(classes.shape[-2])[:, None], taken(classes.shape[-1])]


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
