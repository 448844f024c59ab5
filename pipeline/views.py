"""Draws everything random about a pair of views, without state.

For each image, `sample_views` is a pure function of (seed, epoch, index, height, width). There is
no generator with a state, so worker count, batch size, world size, backend and resume point cannot
change an image's views. The distribution is that of SlotCon's crops and photometric draws (arXiv
2205.15288).

Draw layout. Philox's key is the seed, its counter (block, epoch, low and high half of the index). A
block is four 32-bit words w; u = w / 2^32 is in [0, 1), and floor(w·n / 2^32) an integer in 0..n-1.

    block     its four words
    t         crop 1, try t = 0..9: area, aspect, x, y
    16 + t    crop 2, try t under the overlap condition: the same
    32 + t    crop 2, try t without the condition, if those have failed: the same
    64 + 8v   view v = 0, 1: u < p for flip, jitter, grey, blur
    65 + 8v   brightness, contrast, saturation, hue
    66 + 8v   order (which of the 24 permutations), blur sigma, u < p for solarize, unused

So no value depends on another draw: each can be computed alone, on any device, in any order.
Without `geometry`, view 2 uses crop 1 and view 1's flip; its draws for crop and flip are unused.

Philox4x32-10 is a counter-based random generator: 128 bits of counter and 64 bits of key give 128
random bits (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
"""

import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.bounds import POSITIVE, RANGE, UP_TO_1, Bound, Bounded, at_least, at_most, within
from pipeline.compiling import njit
from pipeline.errors import require

_TRIES = 10  # as in torchvision's RandomResizedCrop and in the authors' sampler
_CROP_1, _CROP_2, _CROP_2_FREE, _PHOTOMETRIC = 0, 16, 32, 64  # first blocks, see the layout above

_compiled = njit(nogil=True, cache=True)

_TWO_SHARES: Bound = {
    "two numbers in 0..1": lambda pair: len(pair) == 2 and all(0 <= p <= 1 for p in pair)
}


@dataclass(frozen=True)
class ViewConfig(Bounded):
    """How a pair of views is drawn; the defaults are SlotCon's."""

    size: int = field(
        default=224,
        metadata={"a whole number >= 1": lambda size: size >= 1 and size % 1 == 0} | at_most(4096),
    )
    """Side of a view in pixels."""
    min_scale: float = field(default=0.08, metadata=UP_TO_1)
    """Smallest crop, as a share of the image's area."""
    max_scale: float = 1.0
    """Largest crop, as a share of the image's area."""
    min_aspect: float = field(default=3 / 4, metadata=POSITIVE | at_least(0.001))
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
    """Whether the views differ in crop and flip. If not, view 2 has view 1's crop and flip, and
    min_overlap has no effect. No other draw changes. SlotCon's table 8e says only that geometric
    augmentation is off; here each epoch still draws a new common crop and flip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.geometry, bool), "geometry", self.geometry, "true or false")
        require(
            self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, "in min_scale..1"
        )
        require(
            self.min_aspect <= self.max_aspect <= 1000,
            "max_aspect",
            self.max_aspect,
            "at least min_aspect and at most 1,000",
        )


@dataclass(frozen=True)
class ViewParams:
    """The drawn parameters of B pairs of views; the view axis comes first."""

    crops: NDArray[np.int32]
    """[2, B, 4] x0 y0 x1 y1 in pixels of the image; inside the image and never empty."""
    flipped: NDArray[np.bool_]
    """[2, B]"""
    overlap: NDArray[np.float32]
    """[2, B, 4] x1 y1 x2 y2: the crops' intersection in the 0..1 frame of each view after its flip.
    Never clipped: a pair without overlap has x2 <= x1 or y2 <= y1."""
    jitter: NDArray[np.float32]
    """[2, B, 4] factors of brightness, contrast and saturation, hue shift in turns (-0.5..0.5);
    1 1 1 0 where not jittered."""
    order: NDArray[np.uint8]
    """[2, B, 4] the jitter's operations from first to last: a permutation of
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
    seed: int, epoch: int, index: ArrayLike, height: ArrayLike, width: ArrayLike, config: ViewConfig
) -> ViewParams:
    """Draw a pair of views of each image. Releases the GIL.

    seed: 0..2^64-1. epoch: 0..2^32-1. index [B]: the images' numbers, 64 bits. height, width [B]:
    the images' sides in pixels, at least 1. Anything else raises a ValueError. An image's views do
    not depend on the rest of the batch.
    """
    index, height, width = _checked(seed, epoch, index, height, width)
    params = _empty(len(index))
    numbers = _Numbers(*(_as_float(getattr(config, f.name)) for f in fields(config)))
    arrays = _Arrays(*(getattr(params, f.name) for f in fields(params)))
    key, images = np.uint64(seed), index.view(np.uint64)
    _sample_batch(key, np.uint32(epoch), images, height, width, numbers, arrays)
    return params


def _checked(
    seed: int, epoch: int, index: ArrayLike, height: ArrayLike, width: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """index, height and width as the compiled code needs them. Raises ValueError."""
    index, height, width = (
        np.ascontiguousarray(array, dtype=np.int64) for array in (index, height, width)
    )
    if index.ndim != 1 or not index.shape == height.shape == width.shape:
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
    """Floats only: a whole number in a config would cause another compilation of the kernel."""
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


# ---- The compiled part; functions below `_sample_batch` work on one image ----

# ViewConfig and ViewParams as named tuples, the only kind of record that numba reads.
_Numbers = namedtuple("_Numbers", [f.name for f in fields(ViewConfig)])  # type: ignore[misc]
_Arrays = namedtuple("_Arrays", [f.name for f in fields(ViewParams)])  # type: ignore[misc]

_PERMUTATIONS = np.array(list(itertools.permutations(range(4))), np.uint8)


class _Stream(NamedTuple):
    """Philox's input without the block number, five uint32: an image in an epoch of a run."""

    epoch: np.uint32
    index_low: np.uint32
    index_high: np.uint32
    seed_low: np.uint32
    seed_high: np.uint32


class _Box(NamedTuple):
    """A crop in pixels; `area` was drawn, and is not rounded. Width 0 marks a try that failed."""

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
    seed_low, seed_high = np.uint32(seed), np.uint32(seed >> _HIGH)
    for b in range(len(index)):
        index_low, index_high = np.uint32(index[b]), np.uint32(index[b] >> _HIGH)
        stream = _Stream(epoch, index_low, index_high, seed_low, seed_high)
        first = second = _free_crop(stream, _CROP_1, height[b], width[b], config)
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


_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint32(0x9E3779B9)
_WEYL_1 = np.uint32(0xBB67AE85)
_HIGH = np.uint64(32)


@_compiled
def philox4x32(
    c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32, k0: np.uint32, k1: np.uint32
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Four random words from counter (c0, c1, c2, c3) and key (k0, k1); all of them uint32."""
    for _ in range(10):
        product_0 = np.uint64(c0) * _MULTIPLIER_0
        product_1 = np.uint64(c2) * _MULTIPLIER_1
        c0 = np.uint32(product_1 >> _HIGH) ^ c1 ^ k0
        c1 = np.uint32(product_1)
        c2 = np.uint32(product_0 >> _HIGH) ^ c3 ^ k1
        c3 = np.uint32(product_0)
        k0 = np.uint32(k0 + _WEYL_0)
        k1 = np.uint32(k1 + _WEYL_1)
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


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
    for block in range(first_block, first_block + _TRIES):
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
    for block in range(_CROP_2, _CROP_2 + _TRIES):
        box = _try_crop(stream, block, height, width, config)
        if box.width > 0 and _common_area(box, first) >= config.min_overlap * box.area:
            return box
    return _free_crop(stream, _CROP_2_FREE, height, width, config)


@_compiled
def _common_area(a: _Box, b: _Box) -> int:
    w = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    h = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(w, 0) * max(h, 0)


@_compiled
def _write_geometry(box: _Box, other: _Box, view: int, b: int, out: Any) -> None:
    """Crop and overlap box of one view, whose flip is already written; `other`: the other crop."""
    crop, overlap = out.crops[view, b], out.overlap[view, b]
    crop[0], crop[1], crop[2], crop[3] = box.x, box.y, box.x + box.width, box.y + box.height
    x1 = (max(box.x, other.x) - box.x) / box.width
    x2 = (min(box.x + box.width, other.x + other.width) - box.x) / box.width
    overlap[0], overlap[2] = (1 - x2, 1 - x1) if out.flipped[view, b] else (x1, x2)
    overlap[1] = (max(box.y, other.y) - box.y) / box.height
    overlap[3] = (min(box.y + box.height, other.y + other.height) - box.y) / box.height


@_compiled
def _write_photometric(stream: _Stream, view: int, b: int, config: Any, out: Any) -> None:
    """Flip and colours of one view."""
    block = _PHOTOMETRIC + 8 * view
    chance, factor, rest = _draw(stream, block), _draw(stream, block + 1), _draw(stream, block + 2)
    out.flipped[view, b] = _unit(chance[0]) < config.flip
    out.jittered[view, b] = _unit(chance[1]) < config.jitter
    out.grey[view, b] = _unit(chance[2]) < config.grey
    blurred = _unit(chance[3]) < config.blur[view]
    low, high = config.blur_sigma
    out.sigma[view, b] = _uniform(rest[1], low, high) if blurred else 0.0
    out.solarized[view, b] = _unit(rest[2]) < config.solarize[view]
    permutation = _PERMUTATIONS[_below(rest[0], 24)]
    for i in range(4):
        out.order[view, b, i] = permutation[i]
    jitter = out.jitter[view, b]
    jitter[0], jitter[1], jitter[2], jitter[3] = 1.0, 1.0, 1.0, 0.0
    if out.jittered[view, b]:
        jitter[0] = _uniform(factor[0], 1 - config.brightness, 1 + config.brightness)
        jitter[1] = _uniform(factor[1], 1 - config.contrast, 1 + config.contrast)
        jitter[2] = _uniform(factor[2], 1 - config.saturation, 1 + config.saturation)
        jitter[3] = _uniform(factor[3], -config.hue, config.hue)
