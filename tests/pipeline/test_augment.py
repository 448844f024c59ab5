"""Augmentation: reference against torchvision, kornia against reference, hard images."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.ops import roi_align

from pipeline.augment import BACKENDS, IMAGENET_MEAN, IMAGENET_STD, get_backend
from pipeline.augment.kornia import blur_kernels
from pipeline.errors import UserError
from pipeline.views import ViewConfig, ViewParams, sample_views
from tests.helpers.view_params import take

CPU = torch.device("cpu")
STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)
MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
PLAIN: dict[str, Any] = {"jitter": 0, "grey": 0, "blur": (0, 0), "solarize": (0, 0)}
SIZE = 128

# On a CPU the third backend, triton, needs an interpreter: tests/pipeline/test_triton.py.
backends = pytest.mark.parametrize("name", ("reference", "compiled", "kornia"))


def pack(images: list[NDArray[np.uint8]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Images -> canvas uint8 [B, Hmax, Wmax, 3] with `padding` around them, sizes [B, 2]."""
    sizes = torch.tensor([image.shape[:2] for image in images])
    height, width = sizes.max(dim=0).values.tolist()
    canvas = torch.full((len(images), height + 3, width + 5, 3), padding, dtype=torch.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = torch.from_numpy(image.copy())
    return canvas, sizes


def draw(sizes: Tensor, seed: int = 0, **config: Any) -> ViewParams:
    height, width = sizes.numpy().T
    return sample_views(seed, 0, np.arange(len(sizes)), height, width, ViewConfig(**config))


def run(
    name: str,
    canvas: Tensor,
    sizes: Tensor,
    params: ViewParams,
    size: int = SIZE,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return get_backend(name).apply(canvas, sizes, params, size, device, dtype)


def levels(views: Tensor) -> Tensor:
    """Undo the normalisation: 0..255."""
    return (views.float().cpu() * STD + MEAN) * 255


def photographs() -> list[NDArray[np.uint8]]:
    """Photographs of the scikit-image package: nothing is downloaded."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [getattr(skimage.data, name)() for name in names]


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Coordinate ramp: red = x, green = y, over 0..255; blue = 128."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.stack((x, y, np.full((height, width), 128)), axis=-1).round().astype(np.uint8)


# ---- Reference against an independent composition of torchvision's own functions ----

OPERATIONS: list[Callable[[Image.Image, float], Image.Image]] = [
    TF.adjust_brightness,
    TF.adjust_contrast,
    TF.adjust_saturation,
    TF.adjust_hue,
]


def composed(image: NDArray[np.uint8], params: ViewParams, v: int, b: int) -> Tensor:
    """One view by resized_crop and the published order of operations."""
    x0, y0, x1, y1 = map(int, params.crops[v, b])
    bicubic = TF.InterpolationMode.BICUBIC
    source = Image.fromarray(image)
    view = TF.resized_crop(source, y0, x0, y1 - y0, x1 - x0, [y1 - y0, SIZE], bicubic)
    view = TF.resize(view, [SIZE, SIZE], bicubic)  # widths first, whatever the version of Pillow
    if params.flipped[v, b]:
        view = ImageOps.mirror(view)
    if params.jittered[v, b]:
        for operation in params.order[v, b]:
            view = OPERATIONS[operation](view, float(params.jitter[v, b, operation]))
    if params.grey[v, b]:
        view = TF.to_grayscale(view, num_output_channels=3)
    if params.sigma[v, b]:
        view = view.filter(ImageFilter.GaussianBlur(float(params.sigma[v, b])))
    pixels = np.asarray(view).astype(np.float32).transpose(2, 0, 1)
    if params.solarized[v, b]:
        pixels = np.where(pixels >= 128, 255 - pixels, pixels)
    return torch.from_numpy(pixels)


def test_reference_is_the_published_recipe() -> None:
    """All other backends are compared with this one, so no other test would see a wrong order."""
    images = photographs() * 4
    canvas, sizes = pack(images)
    params = draw(sizes, seed=5)
    drawn = (params.flipped, params.jittered, params.grey, params.sigma[1] > 0, params.solarized[1])
    assert all(0 < d.mean() < 1 for d in drawn), "the seed must exercise both sides of each draw"
    views = levels(run("reference", canvas, sizes, params))
    for v in range(2):
        for b, image in enumerate(images):
            expected = composed(image, params, v, b)
            torch.testing.assert_close(views[v, b], expected, atol=0.01, rtol=0)


# ---- kornia against reference ----

ONE: dict[str, Any] = PLAIN | {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
# Configuration, and bounds over all views: mean absolute error in levels of 255, PSNR in dB.
FIDELITY: dict[str, tuple[dict[str, Any], float, float]] = {
    "geometry": (PLAIN, 0.5, 48),
    "brightness": (ONE | {"jitter": 1, "brightness": 0.4}, 0.5, 48),
    "contrast": (ONE | {"jitter": 1, "contrast": 0.4}, 0.5, 48),
    "saturation": (ONE | {"jitter": 1, "saturation": 0.2}, 0.5, 48),
    "hue": (ONE | {"jitter": 1, "hue": 0.1}, 0.6, 46),
    "jitter": (PLAIN | {"jitter": 1}, 1, 42),
    "grey": (PLAIN | {"grey": 1}, 0.5, 48),
    "blur": (PLAIN | {"blur": (1, 1)}, 1, 44),
    "solarize": (PLAIN | {"solarize": (1, 1)}, 0.5, 48),
    "recipe": ({}, 1.5, 40),
    "everything": ({"jitter": 1, "blur": (1, 1), "solarize": (1, 1)}, 1.5, 40),
}


def errors(views: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest mean absolute error in levels, and smallest PSNR in dB, of any one view."""
    difference = (levels(views) - levels(expected)).double()
    mean = difference.abs().mean(dim=(2, 3, 4)).max().item()
    square = difference.square().mean(dim=(2, 3, 4)).max().clamp_min(1e-9)
    return mean, (10 * torch.log10(255**2 / square)).item()


@pytest.mark.parametrize("case", FIDELITY)
def test_kornia_is_faithful_on_photographs(case: str) -> None:
    """A wrong unit, rounding, order or border in any operation is far outside these bounds."""
    config, largest_error, smallest_psnr = FIDELITY[case]
    canvas, sizes = pack(photographs() * 2)
    params = draw(sizes, seed=11, **config)
    views, expected = (run(name, canvas, sizes, params) for name in ("kornia", "reference"))
    error, psnr = errors(views, expected)
    assert error <= largest_error and psnr >= smallest_psnr, (error, psnr)


@pytest.mark.cuda
def test_kornia_is_faithful_on_a_gpu() -> None:
    """On a GPU the resize runs in float32, and the blur's convolution may use TF32."""
    canvas, sizes = pack(photographs() * 4)
    params = draw(sizes, seed=11)
    views = run("kornia", canvas, sizes, params, device=torch.device("cuda"))
    error, psnr = errors(views, run("reference", canvas, sizes, params))
    assert error <= 1.5 and psnr >= 40, (error, psnr)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.57, 1.0, 1.7, 2.0, 5.0])
def test_blur_is_that_of_pil(sigma: float) -> None:
    """Impulse responses agree, so the kernel and its width are right for each sigma."""
    kernel = blur_kernels(np.array([sigma], np.float32))[0].astype(np.float64)
    distance = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1) and (kernel >= 0).all()
    assert (kernel * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)
    line = np.zeros((1, 61), np.uint8)
    line[0, 30] = 255
    blurred = Image.fromarray(np.repeat(line, 61, axis=0)).filter(ImageFilter.GaussianBlur(sigma))
    ours = np.convolve(line[0].astype(np.float64), kernel, mode="same")
    np.testing.assert_allclose(np.asarray(blurred)[30], ours, atol=2)


def test_blur_kernels_do_not_depend_on_the_batch() -> None:
    """A wide kernel in the batch only pads a narrow one with zeros; sigma 0 is the identity."""
    both = blur_kernels(np.array([0, 0.4, 2], np.float32))
    alone = blur_kernels(np.array([0.4], np.float32))[0]
    margin = (both.shape[1] - len(alone)) // 2
    np.testing.assert_array_equal(np.pad(alone, margin), both[1])
    identity = np.arange(both.shape[1]) == both.shape[1] // 2
    np.testing.assert_array_equal(both[0], identity)


# ---- Both backends: the contract of `Apply` and `Colour` ----


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shape_type_and_memory_layout(name: str, dtype: torch.dtype) -> None:
    """The encoder gets one view at a time and needs it channels_last without a copy."""
    canvas, sizes = pack([noise(40, 50), noise(60, 30), noise(20, 20)])
    views = run(name, canvas, sizes, draw(sizes), size=32, dtype=dtype)
    assert views.shape == (2, 3, 3, 32, 32) and views.dtype == dtype and views.device == CPU
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(views).all()


@backends
def test_the_canvas_beyond_an_image_never_shows(name: str) -> None:
    """The canvas is reused: beyond an image it holds pixels of other images."""
    images = [noise(30, 80), noise(64, 24), noise(1, 40), noise(90, 90)]
    black, sizes = pack(images, padding=0)
    white, _ = pack(images, padding=255)
    params = draw(sizes, seed=2)
    views = [run(name, canvas, sizes, params, size=48) for canvas in (black, white)]
    assert torch.equal(*views)


@backends
@pytest.mark.parametrize("seed", range(3))
def test_an_image_gets_the_same_pixels_in_any_batch(name: str, seed: int) -> None:
    """Otherwise batch size or world size would change the views."""
    canvas, sizes = pack([noise(50 + 3 * i, 70 - 2 * i, seed=i) for i in range(10)])
    params = draw(sizes, seed=seed, jitter=1, blur=(1, 0.5))
    whole = run(name, canvas, sizes, params, size=64)
    for rows in ([3], [9, 0, 4], list(range(5, 10))):
        part = run(name, canvas[rows], sizes[rows], take(params, rows), size=64)
        assert torch.equal(part, whole[:, rows])


@backends
def test_colour_is_the_rest_of_apply(name: str) -> None:
    """A loader may crop elsewhere; the views must be the same."""
    canvas, sizes = pack(photographs())
    params = draw(sizes, seed=12)
    cropped = run(name, canvas, sizes, replace(draw(sizes, seed=12, **PLAIN), crops=params.crops))
    pixels = levels(cropped).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    views = get_backend(name).colour(pixels, params, CPU, torch.float32)
    torch.testing.assert_close(views, run(name, canvas, sizes, params), atol=1e-5, rtol=0)


HARD = {
    "flat": (8, 400),
    "tall": (400, 8),
    "smaller than the view": (17, 20),
    "one pixel": (1, 1),
    "one row": (1, 300),
}


@pytest.mark.parametrize("image", HARD)
def test_hard_images(image: str) -> None:
    """Both backends handle extreme shapes in the same way: no error and no shift."""
    canvas, sizes = pack([noise(*HARD[image], seed=seed) for seed in range(6)])
    params = draw(sizes, seed=3, **PLAIN)
    views, expected = (run(name, canvas, sizes, params, 224) for name in ("kornia", "reference"))
    error, _ = errors(views, expected)
    assert error <= 1
    assert (levels(views) > -0.01).all() and (levels(views) < 255.01).all()


@backends
def test_whole_recipe_on_hard_images(name: str) -> None:
    """One mixed batch of extreme shapes, with every operation."""
    canvas, sizes = pack([noise(*shape) for shape in HARD.values()])
    config = {"jitter": 1, "grey": 0.5, "blur": (1, 1), "solarize": (0.5, 0.5)}
    assert torch.isfinite(run(name, canvas, sizes, draw(sizes, seed=4, **config))).all()


@backends
def test_a_pair_without_overlap_is_two_good_views(name: str) -> None:
    """The loss excludes the pair, but both views still go through the encoder."""
    canvas, sizes = pack([smooth(200, 200)] * 64)
    params = draw(sizes, min_scale=0.01, max_scale=0.02, flip=0, **PLAIN)
    x1, y1, x2, y2 = params.overlap[0].T
    (apart,) = np.nonzero((x2 <= x1) | (y2 <= y1))
    assert len(apart) > 3
    views = levels(run(name, canvas[apart], sizes[apart], take(params, apart)))
    x0, y0, x1, y1 = params.crops[:, apart].transpose(2, 0, 1)
    centre = np.stack((x0 + x1, y0 + y1), axis=-1) / 2 / 200 * 255
    np.testing.assert_allclose(views.mean(dim=(3, 4))[..., :2].numpy(), centre, atol=2)


@backends
@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True), (True, True)])
def test_a_flip_mirrors_its_own_view_only(name: str, flip: tuple[bool, bool]) -> None:
    """With a flip of the wrong view or axis, every aligned cell would show wrong pixels."""
    canvas, sizes = pack([smooth(120, 90), noise(60, 80)])
    params = draw(sizes, seed=6, **PLAIN)
    params.flipped[:] = False
    upright = run(name, canvas, sizes, params)
    params.flipped[:] = np.array(flip)[:, None]
    views = run(name, canvas, sizes, params)
    for v in range(2):
        expected = upright[v].flip(-1) if flip[v] else upright[v]
        torch.testing.assert_close(views[v], expected, atol=0.01, rtol=0)


def aligned(views: Tensor, params: ViewParams, cells: int) -> Tensor:
    """Inverse augmentation: [2, B, 3, S, S] -> the overlap, un-flipped, [2, B, 3, cells, cells]."""
    out = []
    for v in range(2):
        boxes = torch.from_numpy(params.overlap[v]) * views.shape[-1]
        rois = [box[None] for box in boxes]
        grid = roi_align(views[v].contiguous(), rois, cells, aligned=True)
        flipped = torch.from_numpy(params.flipped[v])[:, None, None, None]
        out.append(torch.where(flipped, grid.flip(-1), grid))
    return torch.stack(out)


@backends
def test_a_coordinate_ramp_returns_to_its_position(name: str) -> None:
    """Crop, flip and recorded overlap of both views lead to the same pixels of the image.

    The image's colour is its coordinate, so each aligned cell shows its position. In both views it
    must be the centre of the overlap's cell, within half a cell. Any wrong box would show.
    """
    height, width, cells, count = 200, 256, 7, 48
    canvas, sizes = pack([smooth(height, width)] * count)
    params = draw(sizes, seed=8, **PLAIN)
    assert all((params.flipped == np.array(f)[:, None]).all(0).any() for f in np.ndindex(2, 2))
    position = aligned(levels(run(name, canvas, sizes, params, 112)), params, cells)[:, :, :2]
    position *= torch.tensor([width - 1, height - 1]).view(2, 1, 1) / 255
    position += 0.5  # a pixel's colour is that of its centre

    corner = torch.from_numpy(params.crops[..., :2].max(0))  # the overlap in the image, [B, 2]
    extent = torch.from_numpy(params.crops[..., 2:].min(0)) - corner
    steps = (torch.arange(cells) + 0.5) / cells
    x = (corner[:, :1] + extent[:, :1] * steps)[:, None, :].expand(-1, cells, -1)
    y = (corner[:, 1:] + extent[:, 1:] * steps)[:, :, None].expand(-1, -1, cells)
    half_cell = (extent / cells / 2)[:, :, None, None]
    distance = (position - torch.stack((x, y), dim=1)).abs()
    # A level is 1 pixel: for the few overlaps of about this size there is no better resolution.
    assert (distance <= half_cell.clamp_min(1.5)).all()
    assert (extent.min(dim=1).values > 42).float().mean() > 0.5  # for most the limit is half a cell


# ---- Choosing a backend ----


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_found_by_name(name: str) -> None:
    """Every name that the error message lists must work."""
    assert all(map(callable, get_backend(name)))


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    """For a typo in a configuration, the message must list the valid names."""
    with pytest.raises(UserError, match=r"'korina'.*reference, compiled, kornia, triton"):
        get_backend("korina")


def test_kornia_is_imported_only_when_needed() -> None:
    """Its import takes seconds, which would slow down every --help."""
    code = "import sys, pipeline.augment; sys.exit('kornia' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
