"""`pipeline.views.sample_views` as whole-array operations of NumPy or Torch, for any device.

One formulation for both: whatever is drawn for a pair is computed for every image at once, all
tries included, and the first try that fits is chosen afterwards. So there are no branches, and on a
GPU nothing for the host to wait for. The draws are those of the layout in `pipeline.views`.

Every operation but the exponential is correctly rounded, and so the same everywhere. Torch's
exponential differs from libm's in the last bit of one aspect in 200 (NumPy's does not), which moves
the side of a crop of some hundred pixels by 10^-14 of a pixel before it is rounded to whole ones:
with a chance below 10^-12 a pair it rounds otherwise. Everything else is equal to the last bit.

B images; a try is a row, so that boxes of T tries are [T, B].
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from pipeline.augment import JITTER_NEUTRAL
from pipeline.philox import philox4x32_arrays
from pipeline.views import (
    CROP_1,
    CROP_2,
    CROP_2_FREE,
    PERMUTATIONS,
    PHOTOMETRIC,
    TRIES,
    ViewConfig,
    ViewParams,
    checked_images,
)

_Array = Any  # np.ndarray or torch.Tensor: they share the operations that are used here
_WORD = 0xFFFFFFFF
_VIEWS = (PHOTOMETRIC, PHOTOMETRIC + 8)
_BLOCKS = [first + t for first in (CROP_1, CROP_2, CROP_2_FREE) for t in range(TRIES)]
_BLOCKS += [first + part for part in range(3) for first in _VIEWS]


def sample_views_numpy(
    seed: int,
    epoch: int,
    index: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    config: ViewConfig,
) -> ViewParams:
    """See `pipeline.views.sample_views`."""
    return _sample(
        np, "cpu", seed, epoch, *checked_images(seed, epoch, index, height, width), config
    )


def sample_views_torch(
    seed: int,
    epoch: int,
    index: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    config: ViewConfig,
    device: torch.device | str = "cpu",
) -> ViewParams:
    """See `pipeline.views.sample_views`. The fields are tensors on `device`, of the same types."""
    images = checked_images(seed, epoch, index, height, width)
    return _sample(torch, device, seed, epoch, *images, config)


class _Boxes(NamedTuple):
    """Crops in pixels, int64; area is the drawn one, before rounding; fits: bool, whether it is a
    crop of the image at all.
    """

    x: _Array
    y: _Array
    width: _Array
    height: _Array
    area: _Array
    fits: _Array


def _sample(
    xp: ModuleType,
    device: torch.device | str,
    seed: int,
    epoch: int,
    index: _Array,
    height: _Array,
    width: _Array,
    config: ViewConfig,
) -> ViewParams:
    index, height, width = (xp.asarray(a, device=device) for a in (index, height, width))
    blocks = xp.asarray(_BLOCKS, device=device)[:, None]
    stream = (epoch, index & _WORD, (index >> 32) & _WORD, seed & _WORD, seed >> 32)
    words = philox4x32_arrays(blocks, *stream)
    tries = _tried(xp, [word[: 3 * TRIES] for word in words], height, width, config)
    first, second = _choose(xp, tries, _largest(xp, height, width, config), config)
    photometric = [word[3 * TRIES :].reshape(3, 2, len(index)) for word in words]
    return _params(xp, first, second, photometric, config)


def _real(xp: ModuleType, x: _Array) -> _Array:
    """float64; Torch would otherwise make float32 of integers."""
    return xp.asarray(x, dtype=xp.float64)


def _uniform(xp: ModuleType, word: _Array, low: float = 0, high: float = 1) -> _Array:
    return low + (high - low) * (_real(xp, word) * 2.0**-32)


def _below(word: _Array, count: _Array) -> _Array:
    """Integers in 0..count-1; a count is at most 2^31."""
    return (word * count) >> 32


def _rounded(xp: ModuleType, x: _Array) -> _Array:
    return xp.asarray(xp.round(x), dtype=xp.int64)


def _tried(
    xp: ModuleType, words: list[_Array], height: _Array, width: _Array, config: ViewConfig
) -> _Boxes:
    """Crops of random area and aspect from the four words [T, B] of each try."""
    area = _uniform(xp, words[0], config.min_scale, config.max_scale) * height * width
    log_aspect = _uniform(xp, words[1], math.log(config.min_aspect), math.log(config.max_aspect))
    aspect = xp.exp(log_aspect)
    w, h = _rounded(xp, xp.sqrt(area * aspect)), _rounded(xp, xp.sqrt(area / aspect))
    x, y = _below(words[2], width - w + 1), _below(words[3], height - h + 1)
    return _Boxes(x, y, w, h, area, (w > 0) & (w <= width) & (h > 0) & (h <= height))


def _largest(xp: ModuleType, height: _Array, width: _Array, config: ViewConfig) -> _Boxes:
    """The largest centred crop of an allowed aspect: [1, B]."""
    widest, narrowest = (_real(xp, height) * a for a in (config.max_aspect, config.min_aspect))
    w = xp.where(width > widest, _rounded(xp, widest).clip(1), width)
    highest = _rounded(xp, _real(xp, width) / config.min_aspect).clip(1)
    h = xp.where(width < narrowest, highest, height)
    box = ((width - w) // 2, (height - h) // 2, w, h, _real(xp, w * h), w > 0)
    return _Boxes(*(field[None] for field in box))


def _choose(
    xp: ModuleType, tries: _Boxes, largest: _Boxes, config: ViewConfig
) -> tuple[_Boxes, _Boxes]:
    """Both crops, [B], from ten tries at the first, ten at the second that the first must cover to
    min_overlap of its drawn area, and ten at the second without that condition. Without geometry
    the second is the first.
    """
    first, covered, free = (
        _Boxes(*(field[k * TRIES : (k + 1) * TRIES] for field in tries)) for k in range(3)
    )
    one = _first_that_fits(xp, first, largest)
    if not config.geometry:
        return one, one
    left, top, right, bottom = _intersection(xp, one, covered)
    common = (right - left).clip(0) * (bottom - top).clip(0)
    covered = covered._replace(fits=covered.fits & (common >= config.min_overlap * covered.area))
    return one, _first_that_fits(xp, covered, free, largest)


def _first_that_fits(xp: ModuleType, *candidates: _Boxes) -> _Boxes:
    """Image by image, of all candidates [T, B] in this order: [B]."""
    boxes = _Boxes(*(xp.concatenate(fields) for fields in zip(*candidates, strict=True)))
    row = xp.argmax(xp.asarray(boxes.fits, dtype=xp.uint8), 0)
    column = xp.arange(len(row), device=row.device)
    return _Boxes(*(field[row, column] for field in boxes))


def _intersection(xp: ModuleType, a: _Boxes, b: _Boxes) -> tuple[_Array, ...]:
    """Left, top, right, bottom, in this order also where nothing is common."""
    return (
        xp.maximum(a.x, b.x),
        xp.maximum(a.y, b.y),
        xp.minimum(a.x + a.width, b.x + b.width),
        xp.minimum(a.y + a.height, b.y + b.height),
    )


def _params(
    xp: ModuleType, first: _Boxes, second: _Boxes, words: list[_Array], config: ViewConfig
) -> ViewParams:
    """From the crops and the four words [3, 2, B] of three blocks for each view."""
    chance, factor, rest = zip(*words, strict=True)
    table = xp.asarray(PERMUTATIONS, device=first.x.device)
    per_view = _real(xp, xp.asarray((config.blur, config.solarize), device=first.x.device))
    blur, solarize = per_view[:, :, None]
    unit = [_uniform(xp, word) for word in (*chance, rest[2])]
    flipped, jittered, grey = unit[0] < config.flip, unit[1] < config.jitter, unit[2] < config.grey
    if not config.geometry:
        flipped = xp.stack((flipped[0], flipped[0]))
    reach = (config.brightness, config.contrast, config.saturation, config.hue)
    jitter = [
        xp.where(jittered, _uniform(xp, word, neutral - r, neutral + r), float(neutral))
        for word, neutral, r in zip(factor, JITTER_NEUTRAL, reach, strict=True)
    ]
    sigma = xp.where(unit[3] < blur, _uniform(xp, rest[1], *config.blur_sigma), 0.0)
    own = _Boxes(*(xp.stack(pair) for pair in zip(first, second, strict=True)))
    corners = (own.x, own.y, own.x + own.width, own.y + own.height)
    return ViewParams(
        crops=xp.asarray(xp.stack(corners, -1), dtype=xp.int32),
        flipped=flipped,
        overlap=_overlap(xp, own, _intersection(xp, first, second), flipped),
        jitter=xp.asarray(xp.stack(jitter, -1), dtype=xp.float32),
        order=table[_below(rest[0], len(table))],
        jittered=jittered,
        grey=grey,
        sigma=xp.asarray(sigma, dtype=xp.float32),
        solarized=unit[4] < solarize,
    )


def _overlap(xp: ModuleType, own: _Boxes, common: tuple[_Array, ...], flipped: _Array) -> _Array:
    """The box common to both views in the frame of each: [2, B, 4]."""
    left, top, right, bottom = common
    x1, x2 = (_real(xp, x - own.x) / own.width for x in (left, right))
    y1, y2 = (_real(xp, y - own.y) / own.height for y in (top, bottom))
    x1, x2 = xp.where(flipped, 1 - x2, x1), xp.where(flipped, 1 - x1, x2)
    return xp.asarray(xp.stack((x1, y1, x2, y2), -1), dtype=xp.float32)
