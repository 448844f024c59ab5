"""Resize, crop, mirror, recolour and pad images and their label maps, on the host.

Letters: H W a stored image's height and width, h w the resized image's, S the side of a crop.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.datasets.label_maps import VOID
from pipeline.augment import IMAGENET_MEAN
from transfer.segmentation.config import AugmentConfig

PADDING = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""The pixel that normalisation maps to about 0."""
TRIES = 10
"""How often a crop is drawn again if nearly all of it is one class."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 0.1
"""Largest change in levels, range of factors, range of factors, largest change in turns."""


class Box(NamedTuple):
    """A part of a resized image, in pixels of the resized image."""

    top: int
    left: int
    height: int
    width: int


def fit(shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """The largest (h, w) of an image of shape [H, W, …] that fits into `size`, a longer and a
    shorter side.
    """
    (height, width), (longer, shorter) = shape[:2], size
    factor = min(longer / max(height, width), shorter / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def cut(
    pixels: np.ndarray, size: tuple[int, int], box: Box, resample: Image.Resampling
) -> np.ndarray:
    """[H, W] or [H, W, 3] → the part `box` of the image resized to `size` = (h, w). The rest is not
    computed.

    BILINEAR is antialiased (the filter widens with the reduction); NEAREST keeps class ids.
    """
    down, right = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    edges = (
        box.left * right,
        box.top * down,
        min((box.left + box.width) * right, pixels.shape[1]),
        min((box.top + box.height) * down, pixels.shape[0]),
    )
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((box.width, box.height), resample, box=edges))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] → [h, w, 3], `size` = (h, w), bilinear as in `cut`."""
    return cut(pixels, size, Box(0, 0, *size), Image.Resampling.BILINEAR)


def augment(
    pixels: np.ndarray, labels: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A training example: image uint8 [H, W, 3] and label map uint8 [H, W] → [S, S, 3] and [S, S],
    S = `config.crop`. All randomness is drawn from `generator`.
    """
    factor = generator.uniform(*config.scale)
    size = fit(labels.shape, tuple(int(side * factor) for side in config.size))
    box, labels = choose(labels, size, config, generator)
    pixels = cut(pixels, size, box, Image.Resampling.BILINEAR)
    if generator.random() < config.flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if config.distort:
        pixels = distort(pixels, generator)
    return pad(pixels, config.crop, PADDING), pad(labels, config.crop, VOID)


def choose(
    labels: np.ndarray,
    size: tuple[int, int],
    config: AugmentConfig,
    generator: np.random.Generator,
) -> tuple[Box, np.ndarray]:
    """Draw a crop: its box and its label map. Up to TRIES times, draw again if one class covers
    `config.max_class_share` of its labelled pixels or more.
    """
    height, width = (min(side, config.crop) for side in size)
    for _ in range(1 + TRIES):
        top = int(generator.integers(size[0] - height + 1))
        left = int(generator.integers(size[1] - width + 1))
        box = Box(top, left, height, width)
        crop = cut(labels, size, box, Image.Resampling.NEAREST)
        if config.max_class_share == 1 or largest_share(crop) < config.max_class_share:
            break
    return box, crop


def largest_share(labels: np.ndarray) -> float:
    """The most frequent class's share of the labelled pixels; 1 if no pixel is labelled."""
    counts = np.bincount(labels[labels != VOID], minlength=1)
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def pad(pixels: np.ndarray, side: int, value: int | tuple[int, ...]) -> np.ndarray:
    """[h, w] or [h, w, 3] → [S, S] or [S, S, 3], S = `side`: pad with `value` right and below."""
    filled = np.full((side, side, *pixels.shape[2:]), value, pixels.dtype)
    filled[: pixels.shape[0], : pixels.shape[1]] = pixels
    return filled


def distort(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """mmsegmentation's photometric distortion, [h, w, 3] → [h, w, 3]: brightness, saturation and
    hue in this order, contrast after the first or the last of them, each with probability 1/2.

    torchvision's RandomPhotometricDistort computes other colours: its brightness is a factor, its
    contrast blends with the mean, and its saturation blends with grey.
    """
    steps: list[Callable[[np.ndarray, np.random.Generator], np.ndarray]]
    steps = [_brightness, _saturation, _hue]
    steps.insert(1 if generator.random() < 0.5 else 3, _contrast)
    for step in steps:
        if generator.random() < 0.5:
            pixels = step(pixels, generator)
    return pixels


def _brightness(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return scaled(pixels, 1, generator.uniform(-BRIGHTNESS, BRIGHTNESS))


def _contrast(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return scaled(pixels, generator.uniform(*CONTRAST), 0)


def _saturation(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return recoloured(pixels, 0, generator.uniform(*SATURATION))


def _hue(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return recoloured(pixels, generator.uniform(-HUE, HUE), 1)


def scaled(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """uint8: each value times `factor`, plus `offset`, clipped to 0..255."""
    return np.clip(pixels * np.float32(factor) + np.float32(offset), 0, 255).astype(np.uint8)


def recoloured(pixels: np.ndarray, turn: float, factor: float) -> np.ndarray:
    """uint8 [h, w, 3]: turn the hue by `turn`, multiply HSV's saturation by `factor`; both in steps
    of 1/256.
    """
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps around, as hue does
    hsv[..., 1] = scaled(hsv[..., 1], factor, 0)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
