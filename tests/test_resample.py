"""Pillow's resize, made again."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.resample import resize

SIDES = st.integers(1, 90)


def pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's, rows first whatever its version."""
    image = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
@example(1, 1, 224, 224, 0)
@example(640, 1, 3, 50, 0)
@example(33, 700, 32, 5, 0)
def test_levels_are_pillows(height: int, width: int, new: int, other: int, seed: int) -> None:
    """Packed and cropped images must be those that the published recipe's library makes; noise, and
    sides that are no multiple of a block, are its hardest cases.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(resize(pixels, new, other), pillow(pixels, new, other))


def test_a_crop_sees_nothing_beyond_itself() -> None:
    """A part of a larger array is not contiguous, and its neighbours must not bleed into it."""
    pixels = np.random.default_rng(1).integers(0, 256, (60, 50, 3), np.uint8)
    crop = pixels[7:40, 3:33]
    assert np.array_equal(resize(crop, 16, 16), pillow(crop.copy(), 16, 16))
