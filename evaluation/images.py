"""Images and label maps as evaluation sees them: shorter side R, centre crop R × R.

Letters: N images, H W a stored image's height and width, R the side of an evaluated image, in
pixels.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.formats import IMAGE_SUFFIXES

VOID = 255
SINGLE_CHANNEL_MODES = frozenset(("1", "L", "P", "I", "I;16"))
TRAINING_SIDE, EVALUATION_SIDE, STRIDE = 224, 320, 32


def evaluation_size(training_size: int) -> int:
    """Side R in pixels at which a model trained on `training_size`-pixel views is evaluated.

    320 for 224 (the COCO-Stuff protocol) and in that proportion otherwise, in whole cells of the
    encoder.
    """
    cells = round(training_size * EVALUATION_SIDE / TRAINING_SIDE / STRIDE)
    return STRIDE * max(cells, 1)


class ImageSource(Protocol):
    """N images to be looked at in order."""

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
    """The images under a folder, in the order of their names. Raises UserError if it has none."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.folder, self.paths = folder, sorted(found)
        if not self.paths:
            raise UserError(
                f"{folder}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> np.ndarray:
        return np.asarray(open_image(self.paths[i]).convert("RGB"))


class LabelMaps:
    """The label map of each image of a folder: the PNG of the same name and size in another folder.

    `classes` names the ids 0 … C-1, and is None where no table says what the ids mean: any id is a
    class then.
    """

    def __init__(
        self,
        images: FolderImages,
        folder: Path,
        classes: list[str] | None = None,
        void: Collection[int] = (VOID,),
    ) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        names = [path.relative_to(images.folder).with_suffix(".png") for path in images.paths]
        missing = [str(name) for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: no label map for {len(missing)} of {len(names)} images"
                f" (the first: {missing[0]})"
            )
        self.paths = [folder / name for name in names]
        self.classes, self.void = classes, np.array(sorted(void), np.int64)
        self.num_classes = VOID if classes is None else len(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int, height: int, width: int) -> np.ndarray:
        """Label map `i` as uint8 [H, W], void as 255. Raises UserError unless it fits the image and
        the table.
        """
        path = self.paths[i]
        image = open_image(path)
        if image.mode not in SINGLE_CHANNEL_MODES:
            raise UserError(f"{path}: not a label map: its pixels are {image.mode}, not class ids")
        if image.size != (width, height):
            raise UserError(
                f"{path}: label map of {image.width}×{image.height} pixels"
                f" for an image of {width}×{height}"
            )
        labels = np.asarray(image).astype(np.int64)
        valid = ~np.isin(labels, self.void)
        unknown = valid & ((labels < 0) | (labels >= self.num_classes))
        if unknown.any():
            first = int(labels[unknown][0])
            raise UserError(
                f"{path}: class id {first} is not in the table of {self.num_classes} classes"
            )
        return np.where(valid, labels, VOID).astype(np.uint8)


def read_classes(path: Path) -> list[str]:
    """Class names, a JSON list in the order of their ids. Raises UserError if it is not that."""
    try:
        names = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not a list of class names")
    if not 0 < len(names) <= VOID or len(set(names)) != len(names):
        raise UserError(f"{path}: needs 1 to {VOID} class names, each once")
    return names


def open_image(path: Path) -> Image.Image:
    """The decoded image at `path`. Raises UserError, naming the file, if it cannot be read."""
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image"
        raise UserError(f"{path}: {reason if path.exists() else 'no such file'}") from None
    return image


def open_images(path: Path) -> ImageSource:
    """The images of a .beton file or of a folder. Raises UserError."""
    return FolderImages(path) if path.is_dir() else BetonImages(path)


def spread(count: int, at_most: int | None) -> np.ndarray:
    """int64 [M], M ≤ `at_most`, of the numbers 0 … count-1: all, or as many as allowed at even
    distances (a beton may be sorted by class, so the first ones would all show the same).
    """
    taken = count if at_most is None else min(count, at_most)
    return np.arange(taken, dtype=np.int64) * count // taken


def centre_square(pixels: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """[H, W] or [H, W, 3] → [R, R] or [R, R, 3]: shorter side to R = `size`, then the centre.

    BILINEAR is antialiased (the filter widens with the reduction); NEAREST keeps class ids as they
    are.
    """
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    # The longer side rounds down, as in torchvision's Resize: crops then fall on the same pixels.
    target = (width * size // shorter, height * size // shorter)
    left, top = (round((side - size) / 2) for side in target)
    image = Image.fromarray(pixels).resize(target, resample)
    return np.asarray(image.crop((left, top, left + size, top + size)))
