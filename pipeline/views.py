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
    128 + v   with masks: ratio of view v; its other words are unused
    128 + v + 2t   with masks: try t = 1, 2, … at a rectangle of view v: area, aspect, top, left

So no value depends on another draw: each can be computed alone, on any device, in any order. Only
the tries at a mask follow one another, as many as it takes (`pipeline.masks`).
Without `geometry`, view 2 uses crop 1 and view 1's flip; its draws for crop and flip are unused.
"""

import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.bounds import (
    BELOW_1,
    POSITIVE,
    RANGE,
    UP_TO_1,
    Bound,
    Bounded,
    at_least,
    at_most,
    within,
)
from pipeline.draws import Stream, below, compiled, draw_block, stream_of, uniform, unit
from pipeline.errors import require
from pipeline.masks import sample_masks

_TRIES = 10  # as in torchvision's RandomResizedCrop and in the authors' sampler
_CROP_1, _CROP_2, _CROP_2_FREE, _PHOTOMETRIC = 0, 16, 32, 64  # first blocks, see the layout above

_PIXELS: Bound = {"a whole number >= 1": lambda size: size >= 1 and size % 1 == 0} | at_most(4096)
_TWO_SHARES: Bound = {
    "two numbers in 0..1": lambda pair: len(pair) == 2 and all(0 <= p <= 1 for p in pair)
}


@dataclass(frozen=True)
class ViewConfig(Bounded):
    """How a pair of views is drawn; the defaults are SlotCon's."""

    size: int = field(default=224, metadata=_PIXELS)
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
    mask_ratio: float = field(default=0.0, metadata=BELOW_1)
    """Share of a view's cells that its mask hides, about: blocks are drawn until the next one does
    not fit (SlotMIM, arXiv 2503.06960, as BEiT). 0 = no masks."""
    mask_ratio_spread: float = field(default=0.0, metadata=within(0, 0.5))
    """The share is uniform in mask_ratio ± this, drawn for each view of each image."""
    mask_cell: int = field(default=16, metadata=_PIXELS)
    """Side of a masked cell in pixels: the patch of the network that sees the masks."""

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
        self._check_masks()

    def _check_masks(self) -> None:
        ratio, spread, cell = self.mask_ratio, self.mask_ratio_spread, self.mask_cell
        if not ratio:
            require(spread == 0, "mask_ratio_spread", spread, "0 without mask_ratio")
            return
        require(self.size % cell == 0, "size", self.size, f"a multiple of mask_cell ({cell})")
        cells = self.mask_side**2
        some = f"such that mask_ratio - mask_ratio_spread hides 1 of a view's {cells} cells or more"
        require((ratio - spread) * cells >= 1, "mask_ratio", ratio, some)
        require(ratio + spread < 1, "mask_ratio", ratio, "below 1 with mask_ratio_spread added")

    @property
    def mask_side(self) -> int:
        """Cells along each side of a view's mask; 0 if there are no masks."""
        return self.size // self.mask_cell if self.mask_ratio else 0

    def unmasked(self) -> "ViewConfig":
        """The same views, without masks."""
        return replace(self, mask_ratio=0.0, mask_ratio_spread=0.0) if self.mask_ratio else self


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
    masks: NDArray[np.bool_] | None = None
    """[2, B, rows, columns] which cells of each view, after its flip, are hidden; None without
    masks."""


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
    arrays = _Arrays(*(getattr(params, f.name) for f in _DRAWN))
    images = (np.uint64(seed), np.uint32(epoch), index.view(np.uint64))
    _sample_batch(*images, height, width, numbers, arrays)
    if not config.mask_ratio:
        return params
    masks = np.zeros((2, len(index), config.mask_side, config.mask_side), np.bool_)
    low, high = (config.mask_ratio + sign * config.mask_ratio_spread for sign in (-1.0, 1.0))
    sample_masks(*images, low, high, masks)
    return replace(params, masks=masks)


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

# ViewConfig and ViewParams, masks excepted, as named tuples: the only records that numba reads.
_Numbers = namedtuple("_Numbers", [f.name for f in fields(ViewConfig)])  # type: ignore[misc]
_DRAWN = fields(ViewParams)[:-1]
_Arrays = namedtuple("_Arrays", [f.name for f in _DRAWN])  # type: ignore[misc]

_PERMUTATIONS = np.array(list(itertools.permutations(range(4))), np.uint8)


class _Box(NamedTuple):
    """A crop in pixels; `area` was drawn, and is not rounded. Width 0 marks a try that failed."""

    x: int
    y: int
    width: int
    height: int
    area: float


@compiled
def _sample_batch(
    seed: np.uint64,
    epoch: np.uint32,
    index: NDArray[np.uint64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    config: Any,
    out: Any,
) -> None:
    for b in range(len(index)):
        stream = stream_of(seed, epoch, index[b])
        first = second = _free_crop(stream, _CROP_1, height[b], width[b], config)
        for view in range(2):
            _write_photometric(stream, view, b, config, out)
        if config.geometry:
            second = _conditioned_crop(stream, first, height[b], width[b], config)
        else:
            out.flipped[1, b] = out.flipped[0, b]
        _write_geometry(first, second, 0, b, out)
        _write_geometry(second, first, 1, b, out)


@compiled
def _try_crop(stream: Stream, block: int, height: int, width: int, config: Any) -> _Box:
    """One try at a crop of random area and aspect; width 0 if it does not fit into the image."""
    words = draw_block(stream, block)
    area = uniform(words[0], config.min_scale, config.max_scale) * height * width
    log_aspect = uniform(words[1], math.log(config.min_aspect), math.log(config.max_aspect))
    aspect = math.exp(log_aspect)
    w = int(np.rint(math.sqrt(area * aspect)))
    h = int(np.rint(math.sqrt(area / aspect)))
    if not (0 < w <= width and 0 < h <= height):
        return _Box(0, 0, 0, 0, area)
    return _Box(below(words[2], width - w + 1), below(words[3], height - h + 1), w, h, area)


@compiled
def _free_crop(stream: Stream, first_block: int, height: int, width: int, config: Any) -> _Box:
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


@compiled
def _conditioned_crop(stream: Stream, first: _Box, height: int, width: int, config: Any) -> _Box:
    """Ten tries at a crop that `first` covers to min_overlap of its drawn area, then a free one."""
    for block in range(_CROP_2, _CROP_2 + _TRIES):
        box = _try_crop(stream, block, height, width, config)
        if box.width > 0 and _common_area(box, first) >= config.min_overlap * box.area:
            return box
    return _free_crop(stream, _CROP_2_FREE, height, width, config)


@compiled
def _common_area(a: _Box, b: _Box) -> int:
    w = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    h = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(w, 0) * max(h, 0)


@compiled
def _write_geometry(box: _Box, other: _Box, view: int, b: int, out: Any) -> None:
    """Crop and overlap box of one view, whose flip is already written; `other`: the other crop."""
    crop, overlap = out.crops[view, b], out.overlap[view, b]
    crop[0], crop[1], crop[2], crop[3] = box.x, box.y, box.x + box.width, box.y + box.height
    x1 = (max(box.x, other.x) - box.x) / box.width
    x2 = (min(box.x + box.width, other.x + other.width) - box.x) / box.width
    overlap[0], overlap[2] = (1 - x2, 1 - x1) if out.flipped[view, b] else (x1, x2)
    overlap[1] = (max(box.y, other.y) - box.y) / box.height
    overlap[3] = (min(box.y + box.height, other.y + other.height) - box.y) / box.height


@compiled
def _write_photometric(stream: Stream, view: int, b: int, config: Any, out: Any) -> None:
    """Flip and colours of one view."""
    block = _PHOTOMETRIC + 8 * view
    chance, factor, rest = (
        draw_block(stream, block),
        draw_block(stream, block + 1),
        draw_block(stream, block + 2),
    )
    out.flipped[view, b] = unit(chance[0]) < config.flip
    out.jittered[view, b] = unit(chance[1]) < config.jitter
    out.grey[view, b] = unit(chance[2]) < config.grey
    blurred = unit(chance[3]) < config.blur[view]
    low, high = config.blur_sigma
    out.sigma[view, b] = uniform(rest[1], low, high) if blurred else 0.0
    out.solarized[view, b] = unit(rest[2]) < config.solarize[view]
    permutation = _PERMUTATIONS[below(rest[0], 24)]
    for i in range(4):
        out.order[view, b, i] = permutation[i]
    jitter = out.jitter[view, b]
    jitter[0], jitter[1], jitter[2], jitter[3] = 1.0, 1.0, 1.0, 0.0
    if out.jittered[view, b]:
        jitter[0] = uniform(factor[0], 1 - config.brightness, 1 + config.brightness)
        jitter[1] = uniform(factor[1], 1 - config.contrast, 1 + config.contrast)
        jitter[2] = uniform(factor[2], 1 - config.saturation, 1 + config.saturation)
        jitter[3] = uniform(factor[3], -config.hue, config.hue)
