"""The CPU's crop and resize against PyTorch's and PIL's."""

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.resize import resize
from tests.helpers.betons import photograph


@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    flipped=st.booleans(),
    seed=st.integers(0, 99),
)
@example(1, 1, (40, 40), False, 0)
@example(150, 1, (1, 1), True, 0)
def test_pixels_are_those_of_pytorch(
    height: int, width: int, shape: tuple[int, int], flipped: bool, seed: int
) -> None:
    """Crops made on the host must equal those of the kornia backend, bit for bit. Noise exercises
    every rounding and both ends of the range. Pixels around a crop must have no influence.
    """
    image = np.random.default_rng(seed).integers(0, 256, (height + 9, width + 6, 3), np.uint8)
    crop = torch.from_numpy(image[4 : 4 + height, 5 : 5 + width]).permute(2, 0, 1)[None]
    expected = interpolate(crop, size=shape, mode="bicubic", antialias=True)[0]
    out = np.empty((*shape, 3), np.uint8)
    resize(image, np.array([5.0, 4, 5 + width, 4 + height]), flipped, out)
    expected = expected.flip(2) if flipped else expected
    assert np.array_equal(out, expected.permute(1, 2, 0).numpy())


def test_fractional_boxes_are_those_of_pil() -> None:
    """A crop of an image that was decoded smaller must keep its position to a fraction of a pixel.
    A box rounded to whole pixels is wrong by up to 5 levels here.
    """
    image = photograph(0, 90, 120)
    box = (10.25, 5.5, 99.75, 80.125)
    out = np.empty((16, 16, 3), np.uint8)
    resize(image, np.array(box), False, out)
    pil = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC, box=box)
    assert np.abs(out.astype(int) - np.asarray(pil)).max() <= 1
