"""The triton backend against PIL: in Triton's interpreter, and the same tests on a GPU.

All operations must give PIL's bytes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import Backend, get_backend
from pipeline.errors import UserError
from pipeline.views import ViewParams
from tests.helpers.interpreted import Interpreter
from tests.helpers.view_params import take
from tests.pipeline.test_augment import (
    CPU,
    ONE,
    PLAIN,
    draw,
    levels,
    noise,
    pack,
    photographs,
)

REFERENCE = get_backend("reference")
SIZE = 20  # not a multiple of any block; the interpreter takes a third of a second per program


class Runner(NamedTuple):
    """The backend under test, and the device of its tensors."""

    backend: Backend
    device: torch.device

    def apply(
        self,
        canvas: Tensor,
        sizes: Tensor,
        params: ViewParams,
        size: int = SIZE,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return self.backend.apply(canvas, sizes, params, size, self.device, dtype)

    def colour(
        self, pixels: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.backend.colour(pixels, params, self.device, dtype)


@pytest.fixture(
    scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)]
)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "cuda":
        yield Runner(get_backend("triton"), torch.device("cuda"))
        return
    with Interpreter() as interpreter:
        yield Runner(interpreter.backend, CPU)


# ---- Colour ----


def colours(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Uniform colours; greys and near-greys; saturated corners of the cube; equal channels."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    quarter = size // 4
    grey = generator.integers(0, 254, (quarter, size, 1), dtype=np.uint8)
    pixels[:quarter] = grey + generator.integers(0, 2, (quarter, size, 3), dtype=np.uint8)
    corners = np.array([0, 1, 85, 128, 170, 254, 255], np.uint8)
    pixels[quarter : 2 * quarter] = generator.choice(corners, (quarter, size, 3))
    pixels[2 * quarter : 3 * quarter, :, 0] = pixels[2 * quarter : 3 * quarter, :, 1]
    return pixels


def coloured(images: int, size: int = SIZE, **config: Any) -> tuple[Tensor, ViewParams]:
    """uint8 [2, B, S, S, 3] and drawn parameters."""
    pixels = np.stack([colours(size, seed) for seed in range(2 * images)])
    params = draw(torch.full((images, 2), size), seed=7, size=size, **config)
    return torch.from_numpy(pixels).unflatten(0, (2, images)), params


def assert_same_bytes(views: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(levels(views), levels(expected), atol=0.01, rtol=0)


OPERATIONS: dict[str, dict[str, Any]] = {
    "nothing": PLAIN,
    "brightness": ONE | {"jitter": 1, "brightness": 1},
    "contrast": ONE | {"jitter": 1, "contrast": 1},
    "saturation": ONE | {"jitter": 1, "saturation": 1},
    "hue": ONE | {"jitter": 1, "hue": 0.5},
    "grey": PLAIN | {"grey": 1},
    "blur": PLAIN | {"blur": (1, 1)},
    "solarize": PLAIN | {"solarize": (1, 1)},
    "jitter": PLAIN | {"jitter": 1},
    "recipe": {},
    "everything": {"jitter": 1, "grey": 0.5, "blur": (1, 1), "solarize": (0.5, 0.5)},
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_colour_gives_the_bytes_of_pil(runner: Runner, operation: str) -> None:
    """Any wrong rounding, order, border or wrap-around shows in some pixel."""
    pixels, params = coloured(3, 32, **OPERATIONS[operation])
    expected = REFERENCE.colour(pixels, params, CPU, torch.float32)
    assert_same_bytes(runner.colour(pixels, params), expected)


def test_every_order_of_the_jitter(runner: Runner) -> None:
    """The contrast divides the jitter: operations before and after it must not be swapped."""
    pixels, params = coloured(12, 8, **PLAIN | {"jitter": 1})
    orders = np.array(list(np.ndindex(4, 4, 4, 4)), np.uint8)
    params.order[:] = orders[[len(set(o)) == 4 for o in orders.tolist()]].reshape(2, 12, 4)
    expected = REFERENCE.colour(pixels, params, CPU, torch.float32)
    assert_same_bytes(runner.colour(pixels, params), expected)


SIGMAS = [0.1, 0.5, 1.0, 1.41, 1.42, 2.0, 2.44, 2.46, 4.0, 8.0]


@pytest.mark.parametrize(
    ("size", "sigmas"), [(1, SIGMAS[::5]), (5, SIGMAS), (60, [0.0, 1.0, 2.0, 0.0])]
)
def test_blur_of_any_width_gives_the_bytes_of_pil(
    runner: Runner, size: int, sigmas: list[float]
) -> None:
    """In one batch, on views smaller than the box and on views of several tiles, with edges."""
    pixels, params = coloured(len(sigmas) // 2, size, **PLAIN)
    params.sigma[:] = np.reshape(sigmas, (2, -1))
    expected = REFERENCE.colour(pixels, params, CPU, torch.float32)
    assert_same_bytes(runner.colour(pixels, params), expected)


def test_neutral_amounts_change_nothing(runner: Runner) -> None:
    """A hue shift of 0 would still round twice, to HSV and back."""
    pixels, params = coloured(2, **ONE | {"jitter": 1})
    untouched = runner.colour(pixels, replace(params, jittered=np.zeros_like(params.jittered)))
    assert torch.equal(runner.colour(pixels, params), untouched)


# ---- Geometry ----

BOXES = {
    "as large as the view": (13, 9, 13 + SIZE, 9 + SIZE),
    "last pixel": (89, 69, 90, 70),
    "one line": (0, 69, 90, 70),
    "one column": (89, 0, 90, 70),
    "twice as large as the view": (5, 30, 45, 70),
    "half as large as the view": (79, 0, 89, 10),
}


def with_crops(params: ViewParams, boxes: Any) -> ViewParams:
    return replace(params, crops=np.broadcast_to(boxes, params.crops.shape).astype(np.int32))


def assert_same_geometry(runner: Runner, image: NDArray[np.uint8], boxes: Any, size: int) -> None:
    """Crops x0 y0 x1 y1 of one image, made by the backend and by PIL."""
    canvas, sizes = pack([image] * len(boxes), padding=255)
    params = with_crops(draw(sizes, seed=3, **PLAIN), boxes)
    expected = REFERENCE.apply(canvas, sizes, params, size, CPU, torch.float32)
    assert_same_bytes(runner.apply(canvas, sizes, params, size), expected)


def test_any_crop_is_that_of_pil(runner: Runner) -> None:
    """One batch of difficult crops: the filter's limits, its width, and no filter at all."""
    assert_same_geometry(runner, noise(70, 90), list(BOXES.values()), SIZE)


def test_a_view_of_several_tiles(runner: Runner) -> None:
    """Each tile must find its own pixels of the crop and of the view."""
    assert_same_geometry(runner, noise(70, 60), [(3, 2, 53, 69)], 66)


@settings(max_examples=4, derandomize=True)
@given(data=st.data())
def test_random_crops_are_those_of_pil(runner: Runner, data: st.DataObject) -> None:
    """The property behind the table of boxes."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height)))
    assert_same_geometry(runner, noise(height, width), [box], data.draw(st.integers(1, 20)))


@pytest.mark.parametrize("shape", [(3, 700), (700, 3)])
def test_a_long_crop(runner: Runner, shape: tuple[int, int]) -> None:
    """Positions are exact at any distance from the corner."""
    assert_same_geometry(runner, noise(*shape), [(0, 0, *shape[::-1])], 8)


def test_sums_are_exact_where_they_are_largest(runner: Runner) -> None:
    """Without it the sums of white crops, up to 250 times as large as the view, lose a bit."""
    for width in (9, 15, 16, 17, 31, 33, 64, 129, 500):
        white = np.full((3, width, 3), 255, np.uint8)
        white[:, ::3, 1] = 254
        assert_same_geometry(runner, white, [(0, 0, width, 3)], 2)


@pytest.mark.cuda
def test_large_photographs() -> None:
    """Offsets must not overflow, and a filter may be wider than a part of the crop."""
    runner = Runner(get_backend("triton"), torch.device("cuda"))
    assert_same_geometry(runner, noise(4000, 4500), [(0, 0, 4500, 4000), (7, 5, 4400, 3999)], 224)


def test_nothing_is_read_beyond_the_crop(runner: Runner) -> None:
    """The canvas around an image holds another image, and the crop comes before the resize."""
    images = [noise(40, 50, seed) for seed in range(2)]
    black, sizes = pack(images, padding=0)
    params = draw(sizes, seed=2, **PLAIN)
    x0, y0, x1, y1 = params.crops[0].T  # both views show the same box
    params = with_crops(params, params.crops[0])
    poisoned = torch.full_like(black, 255)
    for b in range(2):
        box = (b, slice(y0[b], y1[b]), slice(x0[b], x1[b]))
        poisoned[box] = black[box]
    views = [runner.apply(canvas, sizes, params) for canvas in (black, poisoned)]
    assert torch.equal(*views)


def test_only_flipped_views_are_mirrored(runner: Runner) -> None:
    """Checked without the reference, which flips too."""
    canvas, sizes = pack([noise(15, 20, seed) for seed in range(2)])
    params = draw(sizes, seed=6, **PLAIN)
    upright = runner.apply(canvas, sizes, replace(params, flipped=np.zeros((2, 2), np.bool_)))
    flipped = np.array([[False, True], [True, True]])
    views = runner.apply(canvas, sizes, replace(params, flipped=flipped))
    assert torch.equal(views[0, 0], upright[0, 0])
    assert torch.equal(views[0, 1], upright[0, 1].flip(-1))
    assert torch.equal(views[1], upright[1].flip(-1))


# ---- The whole recipe, and the contract of `Apply` and `Colour` ----


def small_photographs() -> list[NDArray[np.uint8]]:
    return [image[::8, ::8] for image in photographs()[:3]]


@pytest.mark.parametrize("config", [PLAIN, {}], ids=["geometry", "recipe"])
def test_photographs_are_those_of_pil(runner: Runner, config: dict[str, Any]) -> None:
    """Without it two passes may be right alone and hand each other the wrong pixels."""
    canvas, sizes = pack(small_photographs())
    params = draw(sizes, seed=11, **config)
    expected = REFERENCE.apply(canvas, sizes, params, SIZE, CPU, torch.float32)
    assert_same_bytes(runner.apply(canvas, sizes, params), expected)


def test_colour_is_the_rest_of_apply(runner: Runner) -> None:
    """A loader may crop elsewhere; the views must be the same."""
    canvas, sizes = pack(small_photographs())
    params = draw(sizes, seed=12)
    plain = draw(sizes, seed=12, **PLAIN)
    cropped = levels(runner.apply(canvas, sizes, replace(plain, crops=params.crops)))
    pixels = cropped.round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    assert torch.equal(runner.colour(pixels, params), runner.apply(canvas, sizes, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_and_memory_layout(runner: Runner, dtype: torch.dtype) -> None:
    """The encoder gets one view at a time and needs it channels_last without a copy. The values
    are those of float32, rounded.
    """
    canvas, sizes = pack([noise(20, 25), noise(10, 30)])
    params = draw(sizes)
    views = runner.apply(canvas, sizes, params, 16, dtype)
    assert views.shape == (2, 2, 3, 16, 16) and views.dtype == dtype
    assert views.device.type == runner.device.type
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last)
    exact = runner.apply(canvas, sizes, params, 16)
    if runner.device == CPU and dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(views.float(), exact, atol=0, rtol=2**-7)
    else:
        assert torch.equal(views, exact.to(dtype))


def test_an_image_gets_the_same_pixels_in_any_batch_and_again(runner: Runner) -> None:
    """Otherwise batch size, world size or the order of atomic sums would change the views.

    Also with a canvas that is a part of another one, and so is not contiguous.
    """
    canvas, sizes = pack([noise(20 + 3 * b, 30 - 2 * b, seed=b) for b in range(3)])
    params = draw(sizes, seed=1, jitter=1, blur=(1, 0.5))
    whole = runner.apply(canvas, sizes, params, 16)
    assert torch.equal(whole, runner.apply(canvas, sizes, params, 16))
    part = runner.apply(canvas[[1]], sizes[[1]], take(params, [1]), 16)
    assert torch.equal(part, whole[:, [1]])
    every_other = runner.apply(canvas[::2], sizes[::2], take(params, slice(None, None, 2)), 16)
    assert torch.equal(every_other, whole[:, ::2])


# ---- Refusals and resources ----


def test_without_a_gpu_it_says_so() -> None:
    """Triton's message would only mention a driver."""
    canvas, sizes = pack([noise(8, 8)])
    backend = get_backend("triton")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        backend.apply(canvas, sizes, draw(sizes), 8, CPU, torch.float32)


def test_a_blur_beyond_the_kernel_is_refused(runner: Runner) -> None:
    """Otherwise the blur would be cut off silently."""
    pixels, params = coloured(1, **PLAIN)
    params.sigma[:] = 9
    with pytest.raises(UserError, match="sigma of at most 8, not 9"):
        runner.colour(pixels, params)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch: int) -> None:
    """Spilled registers go to memory and make a kernel slow; so do more instructions than
    docs/benchmarks.md states. Needs no GPU.
    """
    from tests.compile_kernels import KERNELS, compile_kernel, executed_millions
    from tests.helpers.kernel_work import coco, runs

    work, millions = runs(coco(512, 224), 224), 0.0
    for name in KERNELS:
        used = compile_kernel(name, arch)
        assert used.registers <= 255 and used.spilled == 0, used[:-1]
        assert used.shared + used.static_shared <= 48 * 1024, used[:-1]
        millions += executed_millions(used, work) or 0
    assert 600 < millions < 1300
