"""How often the programs, loops and branches of the Triton kernels run on two views of a batch."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.kernels import words as w
from pipeline.augment.triton import ACROSS, BLUR, COLOUR, DOWN, pack
from pipeline.views import ViewConfig, sample_views
from tools.benchmark.timing import generated_sizes

_Numbers = NDArray[np.int32]


class Runs(NamedTuple):
    """See `tests.helpers.sass.executed`."""

    programs: int
    trips: dict[str, float]
    shares: dict[str, float]


def coco(images: int, size: int) -> _Numbers:
    """The kernels' parameters of the recipe's views of `images` images of COCO's sizes."""
    height, width = generated_sizes(images)
    index = np.arange(images)
    return pack(sample_views(0, 0, index, height, width, ViewConfig(size=size)), size)


def runs(words: _Numbers, size: int) -> dict[str, Runs]:
    """By kernel."""
    everywhere = np.arange(4) < words[:, [w.CONTRAST_POSITION.value]]
    contrast = words[:, w.CONTRAST_POSITION.value] < 4
    afterwards = ~everywhere & contrast[:, None]
    tiles = _ceil(size, DOWN["TILE_I"]) * _ceil(size, DOWN["TILE_J"])
    blocks = _ceil(size**2, COLOUR["BLOCK"])
    height, width = words[:, w.HEIGHT.value], words[:, w.WIDTH.value]
    taps_down = float(_taps(height, size).mean())
    taps = (taps_down + float(_taps(width, size).mean())) / 2
    down, rest = _jitter(words, everywhere), _jitter(words[contrast], afterwards[contrast])
    finish = _finish(words[~contrast]) if (~contrast).any() else {}
    return {
        "weigh": Runs(2 * len(words), {"for k in range(taps": taps}, {}),
        "resize_across": _across(height, width, size),
        "resize_down": Runs(
            len(words) * tiles,
            down.trips | {"for _ in range(taps": taps_down},
            {"tl.atomic_add": contrast.mean()} | down.shares | finish,
        ),
        "colour": Runs(
            len(words) * blocks,
            rest.trips,
            {"mean = (2": contrast.mean()} | rest.shares | _finish(words[contrast]),
        ),
        "blur": _blur(words[:, w.BOX.value], size),
    }


def _across(height: _Numbers, width: _Numbers, size: int) -> Runs:
    first = np.arange(0, size, ACROSS["TILE_J"])
    last = np.minimum(first + ACROSS["TILE_J"], size) - 1
    scale = width[:, None] / size
    begin, end = (
        np.maximum((j + 0.5) * scale - 2 * np.maximum(scale, 1) + 0.5, 0).astype(int)
        for j in (first, last)
    )
    trips = _ceil(end - begin + _taps(width, size)[:, None], ACROSS["COLUMNS"]).mean(axis=1)
    parts = _ceil(height, ACROSS["LINES"])
    launched = len(height) * _ceil(int(height.max()), ACROSS["LINES"])
    return Runs(
        launched * len(first),
        {"for x_first in": float((trips * parts).sum() / parts.sum())},
        {"table = weights": float(parts.sum() / launched), "tl.store(target + 2 * S": 1},
    )


def _jitter(words: _Numbers, part: NDArray[np.bool_]) -> Runs:
    """The operations of each view that are in `part` [2 B, 4]."""
    operation = (words[:, [w.ORDER.value]] >> (4 * np.arange(4))) & 15
    hue = (part & (operation == 3)).sum() / part.sum()
    others = (part & (operation < 3)).sum() / (part & (operation != 3)).sum()
    return Runs(
        0,
        {"for position in": float(part.sum(axis=1).mean())},
        {"wrapped = turns": float(hue), "mixed = ground": float(others)},
    )


def _finish(words: _Numbers) -> dict[str, float]:
    sharp, grey = words[:, w.BOX.value] < 0, words[:, w.GREY.value] != 0
    return {"return tl.where(level": float(sharp.mean()), "return (r * 19595": float(grey.mean())}


def _blur(box: _Numbers, size: int) -> Runs:
    window = BLUR["WINDOW"]
    programs = len(box) * _ceil(size, window - 6 * (int(box.max()) + 1)) ** 2
    used = (_ceil(size, window - 6 * (box + 1)) ** 2)[box >= 0].sum()
    shares = {"level = tl.load(pixel)": float(used / programs), "tl.store(target + 2": 1}
    return Runs(programs, {"for _ in range(3)": 3}, shares)


def _taps(length: _Numbers, size: int) -> _Numbers:
    return _ceil(4 * np.maximum(length, size), size)


def _ceil(a: Any, b: Any) -> Any:
    """a / b, rounded up."""
    return -(-a // b)
