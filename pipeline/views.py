"""Everything random about a pair of views, sampled once and without state.

`sample_views` is, image by image, a pure function of (seed, epoch, index, height, width). No
generator is carried along, so worker count, batch size, world size, backend and resume point cannot
change what an image gets. The distribution is that of SlotCon's crops and photometric draws (arXiv
2205.15288).

Draw layout. Philox's key is the seed, its counter (block, epoch, low and high half of the index). A
block is four 32-bit words w; u = w / 2^32 is in [0, 1), and floor(w·n / 2^32) an integer in 0..n-1.

    block     its four words
    t         crop 1, try t = 0..9: area, aspect, x, y
    16 + t    crop 2, try t under the overlap condition: the same
    32 + t    crop 2, try t without the condition, once those have failed: the same
    64 + 8v   view v = 0, 1: u < p for flip, jitter, grey, blur
    65 + 8v   brightness, contrast, saturation, hue
    66 + 8v   order (which of the 24 permutations), blur sigma, u < p for solarize, unused

So a value depends on no other draw, and each can be computed alone, anywhere, in any order. Without
`geometry`, view 2 takes crop 1 and view 1's flip, and its own stay unused.
"""

import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from pipeline.bounds import POSITIVE, RANGE, UP_TO_1, Bound, Bounded, within
from pipeline.errors import require
from pipeline.philox import philox4x32

TRIES = 10  # as in torchvision's RandomResizedCrop and in the authors' sampler
CROP_1, CROP_2, CROP_2_FREE, PHOTOMETRIC = 0, 16, 32, 64  # first blocks, see the layout above

_compiled = njit(nogil=True, cache=True)

_TWO_SHARES: Bound = {
    "two numbers in 0..1": lambda pair: len(pair) == 2 and all(0 <= p <= 1 for p in pair)
}


@dataclass(frozen=True)
class ViewConfig(Bounded):
    """How a pair of views is drawn; the defaults are SlotCon's.

    Impossible values raise a ValueError that names the field.
    """

    size: int = field(
        default=224, metadata={"a whole number >= 1": lambda size: size >= 1 and size % 1 == 0}
    )
    """Side of a view in pixels."""
    min_scale: float = field(default=0.08, metadata=UP_TO_1)
    """Smallest crop, as a share of the image's area."""
    max_scale: float = 1.0
    """Largest crop, as a share of the image's area."""
    min_aspect: float = field(default=3 / 4, metadata=POSITIVE)
    """Smallest width / height of a crop; the aspect is log-uniform."""
    max_aspect: float = 4 / 3
    """Largest width / height of a crop."""
    min_overlap: float = field(default=0.01, metadata=within(0, 1))
    """Share of crop 2's drawn area that crop 1 must cover; given up after ten tries."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a horizontal flip, per view."""
    jitter: float = field(default=0.8, metadata=within(0, 1))
    """Probability of the colour jitter, per view."""
    brightness: float = field(default=0.4, metadata=within(0, 1))
    """The factor is uniform in 1 ± this."""
    contrast: float = field(default=0.4, metadata=within(0, 1))
    """The factor is uniform in 1 ± this."""
    saturation: float = field(default=0.2, metadata=within(0, 1))
    """The factor is uniform in 1 ± this."""
    hue: float = field(default=0.1, metadata=within(0, 0.5))
    """The shift is uniform in ± this, in turns of the colour wheel."""
    grey: float = field(default=0.2, metadata=within(0, 1))
    """Probability of greyscale, per view."""
    blur: tuple[float, float] = field(default=(1.0, 0.1), metadata=_TWO_SHARES)
    """Probability of the Gaussian blur, on view 1 and on view 2."""
    blur_sigma: tuple[float, float] = field(default=(0.1, 2.0), metadata=RANGE)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: tuple[float, float] = field(default=(0.0, 0.2), metadata=_TWO_SHARES)
    """Probability of solarisation, on view 1 and on view 2."""
    geometry: bool = True
    """Whether the views differ in crop and flip; if not, view 2 has those of view 1 and min_overlap
    has no effect. Changes no other draw. SlotCon's table 8e tells no more than that geometric
    augmentation is off; here the common crop and flip are still drawn anew in each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.geometry, bool), "geometry", self.geometry, "true or false")
        require(
            self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, "in min_scale..1"
        )
        require(
            self.min_aspect <= self.max_aspect < math.inf,
            "max_aspect",
            self.max_aspect,
            "at least min_aspect",
        )


@dataclass(frozen=True)
class ViewParams:
    """The drawn parameters of B pairs of views; the view axis comes first."""

    crops: NDArray[np.int32]
    """[2, B, 4] x0 y0 x1 y1 in pixels of the image; never beyond it, never empty."""
    flipped: NDArray[np.bool_]
    """[2, B]"""
    overlap: NDArray[np.float32]
    """[2, B, 4] x1 y1 x2 y2: the crops' intersection in each view's own 0..1 frame, after its flip.
    Never clipped: a pair without overlap has x2 <= x1 or y2 <= y1."""
    jitter: NDArray[np.float32]
    """[2, B, 4] factors of brightness, contrast and saturation, hue shift in turns (-0.5..0.5);
    1 1 1 0 where not jittered."""
    order: NDArray[np.uint8]
    """[2, B, 4] what the jitter applies first, second, third, last: a permutation of
    0 brightness, 1 contrast, 2 saturation, 3 hue."""
    jittered: NDArray[np.bool_]
    """[2, B]"""
    grey: NDArray[np.bool_]
    """[2, B]"""
    sigma: NDArray[np.float32]
    """[2, B] standard deviation of the blur in pixels of the view, 0 = no blur."""
    solarized: NDArray[np.bool_]
    """[2, B]"""


def sample_views(
    seed: int,
    epoch: int,
    index: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    config: ViewConfig,
) -> ViewParams:
    """Draw a pair of views of each image. Releases the GIL.

    seed: 0..2^64-1. epoch: 0..2^32-1. index [B]: the images' numbers, 64 bits. height, width [B]:
    the images' sides in pixels, at least 1. Anything else raises a ValueError. What an image gets
    does not depend on the rest of the batch.
    """
    index, height, width = checked_images(seed, epoch, index, height, width)
    params = _empty(len(index))
    numbers = _Numbers(*(_as_float(getattr(config, f.name)) for f in fields(config)))
    arrays = _Arrays(*(getattr(params, f.name) for f in fields(params)))
    key, images = np.uint64(seed), index.view(np.uint64)
    _sample_batch(key, np.uint32(epoch), images, height, width, numbers, arrays)
    return params


def checked_images(
    seed: int, epoch: int, index: ArrayLike, height: ArrayLike, width: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """index, height and width as `sample_views` needs them. Raises ValueError."""
    index = np.ascontiguousarray(index, dtype=np.int64)
    height = np.ascontiguousarray(height, dtype=np.int64)
    width = np.ascontiguousarray(width, dtype=np.int64)
    if not (
        index.ndim == height.ndim == width.ndim == 1 and len(index) == len(height) == len(width)
    ):
        raise ValueError("index, height and width must have one axis, of the same length")
    if len(index) and min(height.min(), width.min()) < 1:
        raise ValueError("height and width must be at least 1")
    require(0 <= seed < 1 << 64, "seed", seed, "in 0..2^64-1")
    require(0 <= epoch < 1 << 32, "epoch", epoch, "in 0..2^32-1")
    return index, height, width


def _empty(batch: int) -> ViewParams:
    return ViewParams(
        crops=np.empty((2, batch, 4), np.int32),
        flipped=np.empty((2, batch), np.bool_),
        overlap=np.empty((2, batch, 4), np.float32),
        jitter=np.empty((2, batch, 4), np.float32),
        order=np.empty((2, batch, 4), np.uint8),
        jittered=np.empty((2, batch), np.bool_),
        grey=np.empty((2, batch), np.bool_),
        sigma=np.empty((2, batch), np.float32),
        solarized=np.empty((2, batch), np.bool_),
    )


def _as_float(value: Any) -> Any:
    """A whole number in a config must not cost another compilation of the kernel."""
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


# ---- The compiled part; below `_sample_batch` it deals with one image at a time ----

# ViewConfig and ViewParams in the only form of record that numba reads.
_Numbers = namedtuple("_Numbers", [f.name for f in fields(ViewConfig)])  # type: ignore[misc]
_Arrays = namedtuple("_Arrays", [f.name for f in fields(ViewParams)])  # type: ignore[misc]

PERMUTATIONS = np.array(list(itertools.permutations(range(4))), np.uint8)


class _Stream(NamedTuple):
    """Philox's input but for the block number, five uint32: an image in an epoch of a run."""

    epoch: np.uint32
    index_low: np.uint32
    index_high: np.uint32
    seed_low: np.uint32
    seed_high: np.uint32


class _Box(NamedTuple):
    """A crop in pixels; area is the drawn one, before rounding. Width 0: a try that failed."""

    x: int
    y: int
    width: int
    height: int
    area: float


@_compiled
def _sample_batch(
    seed: np.uint64,
    epoch: np.uint32,
    index: NDArray[np.uint64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    config: Any,
    out: Any,
) -> None:
    high = np.uint64(32)
    seed_low, seed_high = np.uint32(seed), np.uint32(seed >> high)
    for b in range(len(index)):
        index_low, index_high = np.uint32(index[b]), np.uint32(index[b] >> high)
        stream = _Stream(epoch, index_low, index_high, seed_low, seed_high)
        first = second = _free_crop(stream, CROP_1, height[b], width[b], config)
        for view in range(2):
            _write_photometric(stream, view, b, config, out)
        if config.geometry:
            second = _conditioned_crop(stream, first, height[b], width[b], config)
        else:
            out.flipped[1, b] = out.flipped[0, b]
        _write_geometry(first, second, 0, b, out)
        _write_geometry(second, first, 1, b, out)


@_compiled
def _draw(stream: _Stream, block: int) -> Any:
    """The four uint32 words of one block."""
    return philox4x32(
        np.uint32(block),
        stream.epoch,
        stream.index_low,
        stream.index_high,
        stream.seed_low,
        stream.seed_high,
    )


@_compiled
def _unit(word: np.uint32) -> Any:
    return np.float64(word) * 2.0**-32


@_compiled
def _uniform(word: np.uint32, low: float, high: float) -> Any:
    return low + (high - low) * _unit(word)


@_compiled
def _below(word: np.uint32, count: int) -> Any:
    """An integer in 0..count-1."""
    return np.int64((np.uint64(word) * np.uint64(count)) >> np.uint64(32))


@_compiled
def _try_crop(stream: _Stream, block: int, height: int, width: int, config: Any) -> _Box:
    """One try at a crop of random area and aspect; width 0 if it does not fit into the image."""
    words = _draw(stream, block)
    area = _uniform(words[0], config.min_scale, config.max_scale) * height * width
    log_aspect = _uniform(words[1], math.log(config.min_aspect), math.log(config.max_aspect))
    aspect = math.exp(log_aspect)
    w = int(np.rint(math.sqrt(area * aspect)))
    h = int(np.rint(math.sqrt(area / aspect)))
    if not (0 < w <= width and 0 < h <= height):
        return _Box(0, 0, 0, 0, area)
    return _Box(_below(words[2], width - w + 1), _below(words[3], height - h + 1), w, h, area)


@_compiled
def _free_crop(stream: _Stream, first_block: int, height: int, width: int, config: Any) -> _Box:
    """Ten tries, then the largest centred crop of an allowed aspect."""
    for block in range(first_block, first_block + TRIES):
        box = _try_crop(stream, block, height, width, config)
        if box.width > 0:
            return box
    w, h = width, height
    if width < height * config.min_aspect:
        h = max(1, int(np.rint(width / config.min_aspect)))
    elif width > height * config.max_aspect:
        w = max(1, int(np.rint(height * config.max_aspect)))
    return _Box((width - w) // 2, (height - h) // 2, w, h, float(w * h))


@_compiled
def _conditioned_crop(stream: _Stream, first: _Box, height: int, width: int, config: Any) -> _Box:
    """Ten tries at a crop that `first` covers to min_overlap of its drawn area, then a free one."""
    for block in range(CROP_2, CROP_2 + TRIES):
        box = _try_crop(stream, block, height, width, config)
        if box.width > 0 and _common_area(box, first) >= config.min_overlap * box.area:
            return box
    return _free_crop(stream, CROP_2_FREE, height, width, config)


@_compiled
def _common_area(a: _Box, b: _Box) -> int:
    w = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    h = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(w, 0) * max(h, 0)


@_compiled
def _write_geometry(own: _Box, other: _Box, view: int, b: int, out: Any) -> None:
    """Crop and overlap box of one view, whose flip is already written."""
    crop, overlap = out.crops[view, b], out.overlap[view, b]
    crop[0], crop[1], crop[2], crop[3] = own.x, own.y, own.x + own.width, own.y + own.height
    x1 = (max(own.x, other.x) - own.x) / own.width
    x2 = (min(own.x + own.width, other.x + other.width) - own.x) / own.width
    overlap[0], overlap[2] = (1 - x2, 1 - x1) if out.flipped[view, b] else (x1, x2)
    overlap[1] = (max(own.y, other.y) - own.y) / own.height
    overlap[3] = (min(own.y + own.height, other.y + other.height) - own.y) / own.height


@_compiled
def _write_photometric(stream: _Stream, view: int, b: int, config: Any, out: Any) -> None:
    """All of one view but its crop: flip and colours."""
    block = PHOTOMETRIC + 8 * view
    chance, factor, rest = _draw(stream, block), _draw(stream, block + 1), _draw(stream, block + 2)
    out.flipped[view, b] = _unit(chance[0]) < config.flip
    out.jittered[view, b] = _unit(chance[1]) < config.jitter
    out.grey[view, b] = _unit(chance[2]) < config.grey
    blurred = _unit(chance[3]) < config.blur[view]
    low, high = config.blur_sigma
    out.sigma[view, b] = _uniform(rest[1], low, high) if blurred else 0.0
    out.solarized[view, b] = _unit(rest[2]) < config.solarize[view]
    permutation = PERMUTATIONS[_below(rest[0], 24)]
    for place in range(4):
        out.order[view, b, place] = permutation[place]
    jitter = out.jitter[view, b]
    jitter[0], jitter[1], jitter[2], jitter[3] = 1.0, 1.0, 1.0, 0.0
    if out.jittered[view, b]:
        jitter[0] = _uniform(factor[0], 1 - config.brightness, 1 + config.brightness)
        jitter[1] = _uniform(factor[1], 1 - config.contrast, 1 + config.contrast)
        jitter[2] = _uniform(factor[2], 1 - config.saturation, 1 + config.saturation)
        jitter[3] = _uniform(factor[3], -config.hue, config.hue)
