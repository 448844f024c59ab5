"""The compiled backend against PIL: the same bytes in every operation, order, size and border."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.augment import compiled, get_backend
from pipeline.views import ViewParams
from tests.pipeline.test_augment import CPU, PLAIN
from tests.pipeline.test_triton import OPERATIONS, SIGMAS, coloured

REFERENCE = get_backend("reference")


def assert_equal(pixels: Tensor, params: ViewParams) -> None:
    """Not one bit differs from what PIL and torchvision compute."""
    views = compiled.colour(pixels, params, CPU, torch.float32)
    assert torch.equal(views, REFERENCE.colour(pixels, params, CPU, torch.float32))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [1, 7, 32, 65])
def test_colour_gives_the_bits_of_pil(operation: str, size: int) -> None:
    """Any wrong rounding, order, border or wrap-around shows in some pixel."""
    assert_equal(*coloured(3, size, **OPERATIONS[operation]))


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    order=st.permutations(range(4)),
    amounts=st.tuples(*[st.floats(0, 3, width=32)] * 3, st.floats(-0.5, 0.5, width=32)),
    sigma=st.floats(0, 12, width=32),
    switches=st.tuples(*[st.booleans()] * 3),
)
def test_any_amounts_in_any_order(
    seed: int, size: int, order: list[int], amounts: tuple[float, ...], sigma: float,
    switches: tuple[bool, ...],
) -> None:  # fmt: skip
    """The recipe never draws the ends of some ranges: factors of 0 and 1, wide boxes."""
    pixels, params = coloured(1, size)
    pixels = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    )
    params.order[:], params.jitter[:], params.sigma[:] = order, amounts, sigma
    params.jittered[:], params.grey[:], params.solarized[:] = (each for each in switches)
    assert_equal(pixels, params)


def test_every_order_of_the_jitter() -> None:
    """The contrast needs the mean after the operations before it."""
    pixels, params = coloured(12, 8, **PLAIN | {"jitter": 1})
    orders = np.array(list(np.ndindex(4, 4, 4, 4)), np.uint8)
    params.order[:] = orders[[len(set(o)) == 4 for o in orders.tolist()]].reshape(2, 12, 4)
    assert_equal(pixels, params)


@pytest.mark.parametrize("size", [1, 2, 5, 60])
def test_blur_of_any_width(size: int) -> None:
    """On views smaller than the box, and for boxes of reach 0, 1 and more, which have their own
    loops.
    """
    pixels, params = coloured(len(SIGMAS) // 2, size, blur=(1, 1))
    params.sigma[:] = np.array(SIGMAS, np.float32).reshape(2, -1)
    assert_equal(pixels, params)


@pytest.mark.parametrize("shift", [-0.3, 0.1])
def test_the_hue_of_every_colour(shift: float) -> None:
    """All colours whose channels are multiples of 5 or a neighbour of one. Pillow rounds the hue
    through float32, float64 and whole numbers; a step left out changes one colour in thousands.
    """
    values = np.unique(np.r_[np.arange(0, 256, 5), np.arange(1, 256, 15)]).astype(np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(-1, 3)
    size = int(np.ceil(np.sqrt(len(colours))))
    image = np.resize(colours, (size, size, 3))
    pixels, params = coloured(1, size, **PLAIN | {"jitter": 1})
    pixels = torch.from_numpy(np.stack([image[None]] * 2))
    params.jitter[:] = (1, 1, 1, shift)
    assert_equal(pixels, params)


def test_the_pixels_of_the_caller_stay() -> None:
    """The loader's buffers are read again where a record is replaced."""
    pixels, params = coloured(2, 16)
    before = pixels.clone()
    compiled.colour(pixels, params, CPU, torch.float32)
    assert torch.equal(pixels, before)
