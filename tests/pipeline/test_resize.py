"""The CPU's crop and resize against Pillow's, bit for bit."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipeline.resize import resize


def pillow(image: np.ndarray, box: tuple[float, ...], height: int, width: int) -> np.ndarray:
    """Pillow's bicubic resize of the `box` of `image`, rows first; it sees no other pixels."""
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    crop = Image.fromarray(image[top:bottom, left:right])
    across = (box[0] - left, 0, box[2] - left, bottom - top)
    lines = crop.resize((width, bottom - top), Image.Resampling.BICUBIC, across)
    down = (0, box[1] - top, width, box[3] - top)
    return np.asarray(lines.resize((width, height), Image.Resampling.BICUBIC, down))


@given(
    box=st.tuples(*[st.integers(1, 150)] * 2),
    shape=st.tuples(*[st.integers(1, 70)] * 2),
    margins=st.tuples(*[st.integers(0, 20)] * 4),
    parts=st.tuples(*[st.integers(0, 7)] * 4),
    flipped=st.booleans(),
    seed=st.integers(0, 99),
)
@example((1, 1), (40, 40), (0, 0, 0, 0), (0, 0, 0, 0), False, 0)
@example((150, 1), (1, 1), (0, 0, 0, 0), (0, 0, 0, 0), True, 0)
@example((17, 16), (16, 17), (1, 0, 0, 0), (1, 2, 3, 4), True, 0)
def test_pixels_are_those_of_pillow(
    box: tuple[int, int], shape: tuple[int, int], margins: tuple[int, ...],
    parts: tuple[int, ...], flipped: bool, seed: int,
) -> None:  # fmt: skip
    """Noise exercises every rounding and both ends of the range; boxes begin and end at eighths of
    a pixel, as those of images that were decoded smaller. Without it a wrong weight, a lane that
    reads a neighbour's row, or a read beyond the image shows only as slightly other views.
    """
    (height, width), (left, top, right, bottom) = box, margins
    size = (top + height + bottom, left + width + right, 3)
    image = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    inner = np.array([left, top, left + width, top + height]) + np.array([1, 1, -1, -1]) * (
        np.array(parts) / 8 * (min(height, width) > 2)
    )
    out = np.empty((*shape, 3), np.uint8)
    resize(image, inner, flipped, out)
    expected = pillow(image, tuple(inner), *shape)
    assert np.array_equal(out, expected[:, ::-1] if flipped else expected)


def test_extreme_levels_are_clipped_as_pillow_clips_them() -> None:
    """The kernel overshoots at the edge of a black and white field, by up to a tenth of the range;
    a sum that wraps around shows as a dot of the opposite colour.
    """
    for scale in (3, 40, 150):
        image = np.zeros((64, 64, 3), np.uint8)
        image[20:40, 10:50] = 255
        image[::7, ::3] ^= 255
        out = np.empty((scale, scale, 3), np.uint8)
        resize(image, np.array([0.0, 0, 64, 64]), False, out)
        assert np.array_equal(out, pillow(image, (0, 0, 64, 64), scale, scale))
