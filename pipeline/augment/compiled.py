"""The recipe compiled for the CPU, one view at a time, without the GIL: the bytes of PIL.

`paint` colours one view. A thread that has just decoded and cropped an image calls it while the
pixels are in its cache. Integers, float32 and float64 are used where Pillow uses them, so each
operation rounds as Pillow's does.

A view is kept as three planes, because loops over a plane use vector registers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SOLARIZE_THRESHOLD,
    empty_views,
    pillow,
)
from pipeline.compiling import njit
from pipeline.resize import resize
from pipeline.views import ViewParams

_compiled = njit(nogil=True, cache=True, error_model="numpy")  # no checks, so loops use vectors
_i32, _u32, _f32, _f64 = np.int32, np.uint32, np.float32, np.float64


# ---- The compiled part: planes are uint8 [3, S * S] ----


@_compiled
def paint(
    view: NDArray[np.uint8],
    order: NDArray[np.uint8],
    amounts: NDArray[np.float32],
    shift: int,
    grey: bool,
    box: int,
    near: int,
    far: int,
    levels: NDArray[Any],
    planes: NDArray[np.uint8],
    out: NDArray[Any],
) -> None:
    """Colour `view` uint8 [S, S, 3] and write it, normalised, to `out` [S, S, 3].

    order: see `pillow.order`. amounts: of brightness, contrast, saturation.
    shift: of the hue, in 1/255 of a turn. box, near, far: see `pillow.boxes`. levels [3, 256]: the
    output for each level, see `levels`. planes uint8 [3, S * S]: memory to work in.
    """
    _split(view.reshape(-1), planes)
    for operation in order:
        if operation == 0:
            _blend(planes, 0, amounts[0])
        elif operation == 1:
            _blend(planes, _mean_lightness(planes), amounts[1])
        elif operation == 2:
            _saturate(planes[0], planes[1], planes[2], amounts[2])
        elif operation == 3:
            _turn_hue(planes[0], planes[1], planes[2], shift)
    if grey:
        _drain(planes)
    if box >= 0:
        _blur(planes, len(view), box, near, far)
    _write(planes, levels, out.reshape(-1))


@_compiled
def _split(pixels: NDArray[np.uint8], planes: NDArray[np.uint8]) -> None:
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        r[i], g[i], b[i] = pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2]


@_compiled
def _write(planes: NDArray[np.uint8], levels: NDArray[Any], out: NDArray[Any]) -> None:
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        out[3 * i] = levels[0, r[i]]
        out[3 * i + 1] = levels[1, g[i]]
        out[3 * i + 2] = levels[2, b[i]]


@_compiled
def _lightness(r: np.uint8, g: np.uint8, b: np.uint8) -> np.float32:
    """Pillow's whole numbers, all below 2^24: exact in float32. (Numba widens int32 to int64.)"""
    total = _f32(r) * _f32(19595) + _f32(g) * _f32(38470) + _f32(b) * _f32(7471)
    return _f32(_i32((total + _f32(32768)) * _f32(2**-16)))


@_compiled
def _mean_lightness(planes: NDArray[np.uint8]) -> int:
    """Rounded, as ImageEnhance.Contrast does."""
    r, g, b = planes[0], planes[1], planes[2]
    total: Any = 0
    for i in range(len(r)):
        total += _i32(_lightness(r[i], g[i], b[i]))
    return (2 * total + len(r)) // (2 * len(r))


@_compiled
def _mix(ground: np.float32, level: np.float32, factor: np.float32) -> np.uint8:
    """ground (factor 0) to level (factor 1) and beyond, truncated."""
    mixed = ground + factor * (level - ground)
    return np.uint8(_i32(min(max(mixed, _f32(0)), _f32(255))))


@_compiled
def _blend(planes: NDArray[np.uint8], ground: int, factor: np.float32) -> None:
    """Blend all pixels with one level."""
    values, same = planes.reshape(-1), _f32(ground)
    for i in range(len(values)):
        values[i] = _mix(same, _f32(values[i]), factor)


@_compiled
def _saturate(
    r: NDArray[np.uint8], g: NDArray[np.uint8], b: NDArray[np.uint8], factor: np.float32
) -> None:
    for i in range(len(r)):
        light = _lightness(r[i], g[i], b[i])
        r[i] = _mix(light, _f32(r[i]), factor)
        g[i] = _mix(light, _f32(g[i]), factor)
        b[i] = _mix(light, _f32(b[i]), factor)


@_compiled
def _drain(planes: NDArray[np.uint8]) -> None:
    """Lightness in place of all three colours."""
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        r[i] = np.uint8(_i32(_lightness(r[i], g[i], b[i])))
    g[:] = r
    b[:] = r


@_compiled
def _turn_hue(
    red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8], shift: int
) -> None:
    """Turn the hue in HSV, in bytes: 255 levels of hue are a turn, but hue wraps at 256.

    Pillow computes in part in float64. In float32, without branches and with one quotient for the
    hue, the loop takes a third of the time, and gives the same bytes for each of the 2^24 colours.
    (A grey has a wrong hue here, which has no effect.)
    """
    one, three, five, levels = _f32(1), _f32(3), _f32(5), _f32(255)
    for i in range(len(red)):
        r, g, b = _f32(red[i]), _f32(green[i]), _f32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))  # noqa: PLW3301  Numba has no other
        chroma, middle = high - low, r + g + b - high - low
        saturation = _f32(_i32(chroma / max(high, one) * levels))
        part = (high - middle) / max(chroma, one)
        sixths = three + part if r == low else five - part  # if blue is high
        of_green = one + part if b == low else three - part
        of_red = one - part if b == low else part - one
        sixths = of_green if g == high else sixths
        sixths = of_red if r == high else sixths
        turns = sixths / _f32(6)
        turns = turns + one if sixths < _f32(0) else turns
        hue = _f32(_i32(_i32(turns * levels) + _i32(shift)) & _i32(255))
        red[i] = _channel(hue, five, saturation, high)
        green[i] = _channel(hue, three, saturation, high)
        blue[i] = _channel(hue, one, saturation, high)


@_compiled
def _channel(
    hue: np.float32, sixths: np.float32, saturation: np.float32, high: np.float32
) -> np.uint8:
    """A channel of HSV to RGB: the brightest level, less the saturation's share of it where the
    hue is far from the channel, which begins `sixths` of a turn before hue 0.

    The products are whole numbers below 2^24. Quotients are never halfway between two levels.
    """
    at = _f32(6) * hue + _f32(255) * sixths
    at = at - _f32(1530) if at >= _f32(1530) else at
    share = max(min(min(at, _f32(1020) - at), _f32(255)), _f32(0))  # noqa: PLW3301
    level = high * (_f32(65025) - saturation * share)
    return np.uint8(_i32(level * _f32(1 / 65025) + _f32(0.5)))


@_compiled
def _blur(planes: NDArray[np.uint8], side: int, box: int, near: int, far: int) -> None:
    """Three boxes across, three down, with bytes between. Each is one loop over a plane whose edges
    are repeated around it; what such a loop writes to the edges is not used.
    """
    reach = box + 1
    wide = side + 2 * reach
    line, other = np.empty(wide * side, np.uint8), np.empty(wide * side, np.uint8)
    for plane in planes:
        for y in range(side):
            _repeat(plane[y * side : (y + 1) * side], 1, line[y * wide + reach :])
        for _ in range(3):
            for row in line.reshape(side, wide):
                for k in range(reach):
                    row[k], row[wide - 1 - k] = row[reach], row[wide - 1 - reach]
            _box(line, 1, other[reach : len(other) - reach], box, near, far)
            line, other = other, line
        for y in range(side):
            _repeat(line[y * wide + reach : y * wide + reach + side], 1, plane[y * side :])
    for plane in planes:
        for _ in range(3):
            _repeat(plane[:side], reach, line)
            _repeat(plane, 1, line[reach * side :])
            _repeat(plane[len(plane) - side :], reach, line[reach * side + len(plane) :])
            _box(line, side, plane, box, near, far)


@_compiled
def _repeat(source: NDArray[np.uint8], times: int, out: NDArray[np.uint8]) -> None:
    """Write `source` to the start of `out`, `times` times. Numba's own assignment takes longer."""
    for k in range(times):
        for i in range(len(source)):
            out[k * len(source) + i] = source[i]


@_compiled
def _box(
    line: NDArray[np.uint8], step: int, out: NDArray[np.uint8], box: int, near: int, far: int
) -> None:
    """out[i]: the weighted sum of line[i], line[i + step], … of the box and one pixel beyond each
    end. The recipe's sigma of at most 2 has boxes of reach 0 and 1.
    """
    a, last = line, line[2 * (box + 1) * step :]
    b, c, d = line[step:], line[2 * step :], line[3 * step :]
    if box == 0:
        for i in range(len(out)):
            out[i] = _weighted(_u32(b[i]), a[i], last[i], near, far)
    elif box == 1:
        for i in range(len(out)):
            out[i] = _weighted(_u32(_u32(b[i]) + _u32(c[i]) + _u32(d[i])), a[i], last[i], near, far)
    else:
        totals = np.zeros(len(out), np.uint32)
        for k in range(1, 2 * box + 2):
            d = line[k * step :]
            for i in range(len(out)):
                totals[i] += _u32(d[i])
        for i in range(len(out)):
            out[i] = _weighted(totals[i], a[i], last[i], near, far)


@_compiled
def _weighted(total: np.uint32, a: np.uint8, b: np.uint8, near: int, far: int) -> np.uint8:
    """In 32 bits, which Numba would widen."""
    ends = _u32(_u32(_u32(a) + _u32(b)) * _u32(far))
    return np.uint8(_u32(_u32(_u32(total * _u32(near)) + ends) + _u32(1 << 23)) >> _u32(24))


# ---- The backend ----


class Plan:
    """The parameters of B pairs of views as `paint` reads them, computed once for all of them.
    Views are written as `dtype`, whose arrays are those of `as_array`.
    """

    def __init__(self, params: ViewParams, dtype: torch.dtype) -> None:
        self.order, self.shift = pillow.order(params), pillow.hue_shift(params)
        self.amounts, self.grey, self.solarized = params.jitter, params.grey, params.solarized
        self.box, self.near, self.far = pillow.boxes(params.sigma)
        self.dtype = dtype

    def paint(
        self,
        v: int,
        b: int,
        view: NDArray[np.uint8],
        planes: NDArray[np.uint8],
        out: NDArray[Any],
    ) -> None:
        """Colour view `v` of image `b`, uint8 [S, S, 3], into `out` [S, S, 3]."""
        paint(
            view, self.order[v, b], self.amounts[v, b], self.shift[v, b], self.grey[v, b],
            self.box[v, b], self.near[v, b], self.far[v, b],
            levels(bool(self.solarized[v, b]), self.dtype), planes, out,
        )  # fmt: skip


@cache
def levels(solarized: bool, dtype: torch.dtype) -> NDArray[Any]:
    """[3, 256]: the normalised value of each level of red, green and blue, see `as_array`."""
    level = torch.arange(256)
    if solarized:
        level = torch.where(level < SOLARIZE_THRESHOLD, level, 255 - level)
    mean, std = (torch.tensor(each)[:, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return as_array(((level.to(torch.float32) / 255 - mean) / std).to(dtype))


def as_array(values: Tensor) -> NDArray[Any]:
    """The same memory for NumPy. Values of 16 bits are whole numbers with these bits: they are only
    copied, NumPy has no bfloat16, and so both types need one compiled function.
    """
    return (values.view(torch.int16) if values.dtype.itemsize == 2 else values).numpy()


def apply(
    canvas: Tensor,
    sizes: Tensor,  # unused: a crop never reaches beyond its image
    params: ViewParams,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """See `pipeline.augment.Apply`."""
    images = canvas.cpu().numpy()

    def crop(v: int, b: int, view: NDArray[np.uint8]) -> None:
        box = params.crops[v, b].astype(np.float64)
        resize(images[b], box, bool(params.flipped[v, b]), view)

    return _views(len(images), size, params, dtype, crop).to(device)


def colour(pixels: Tensor, params: ViewParams, device: torch.device, dtype: torch.dtype) -> Tensor:
    """See `pipeline.augment.Colour`."""
    crops = pixels.cpu().numpy()

    def copy(v: int, b: int, view: NDArray[np.uint8]) -> None:
        view[:] = crops[v, b]

    return _views(crops.shape[1], crops.shape[2], params, dtype, copy).to(device)


def _views(
    batch: int,
    side: int,
    params: ViewParams,
    dtype: torch.dtype,
    cut: Callable[[int, int, NDArray[np.uint8]], None],
) -> Tensor:
    """`dtype` [2, B, 3, S, S] on the CPU. `cut` writes view v of image b to uint8 [S, S, 3]."""
    views = empty_views(batch, side, torch.device("cpu"), dtype)
    out, plan = as_array(views.permute(0, 1, 3, 4, 2)), Plan(params, dtype)

    def work(b: int) -> None:
        view, planes = np.empty((side, side, 3), np.uint8), np.empty((3, side * side), np.uint8)
        for v in range(2):
            cut(v, b, view)
            plan.paint(v, b, view, planes, out[v, b])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(batch)))
    return views
