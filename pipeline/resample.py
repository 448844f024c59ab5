"""Pillow's bicubic, antialiased resize of 8-bit RGB: the same levels, in half of its time.

Two passes, along the rows and then along the columns, with weights in fixed point and a rounding to
whole levels after each, as in Pillow's Resample.c. (Pillow 13 begins with the columns where that is
less work, which moves single values by one level.) The first pass works on blocks of rows that are
laid on their side, so that both passes add up whole rows of memory, which compiles to vector code.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

_BITS = 22  # of a weight, after the point; what is left of 32 for 8-bit levels, and 2 to spare
_HALF = 1 << (_BITS - 1)
_SUPPORT = 2.0  # of the bicubic kernel, in pixels of the coarser of both grids
_ROWS = 32  # laid on their side at once

_compiled = njit(nogil=True, cache=True)


@_compiled
def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]. Nothing outside of `pixels` is looked at."""
    between = np.empty((pixels.shape[0], 3 * width), np.uint8)
    _along_rows(pixels, between, *_taps(pixels.shape[1], width))
    out = np.empty((height, 3 * width), np.uint8)
    _along_columns(between, out, *_taps(pixels.shape[0], height))
    return out.reshape(height, width, 3)


@_compiled
def _taps(
    size: int, new_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """For each new pixel the first old one it sees, how many, and their weights [new, most]."""
    scale = size / new_size
    coarse = max(scale, 1.0)
    reach = _SUPPORT * coarse
    first, count = np.empty(new_size, np.int64), np.empty(new_size, np.int64)
    weights = np.zeros((new_size, 2 * int(np.ceil(reach)) + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first[i] = max(int(centre - reach + 0.5), 0)
        count[i] = min(int(centre + reach + 0.5), size) - first[i]
        for k in range(count[i]):
            exact[k] = _bicubic((k + first[i] - centre + 0.5) * (1 / coarse))
        total = 0.0
        for k in range(count[i]):
            total += exact[k]
        for k in range(count[i]):
            weight = exact[k] * (1 / total) * (1 << _BITS)
            weights[i, k] = int(weight + 0.5) if weight >= 0 else int(weight - 0.5)
    return first, count, weights


@_compiled
def _bicubic(x: float) -> float:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@_compiled
def _along_rows(
    pixels: NDArray[np.uint8],
    out: NDArray[np.uint8],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
    weights: NDArray[np.int32],
) -> None:
    height, width, _ = pixels.shape
    block = np.zeros((width, 3 * _ROWS), np.uint8)
    total = np.empty(3 * _ROWS, np.int32)
    for top in range(0, height, _ROWS):
        rows = min(_ROWS, height - top)
        for x in range(width):
            column = block[x]
            for r in range(rows):
                column[r] = pixels[top + r, x, 0]
                column[_ROWS + r] = pixels[top + r, x, 1]
                column[2 * _ROWS + r] = pixels[top + r, x, 2]
        for i in range(len(first)):
            _add_up(block, first[i], count[i], weights[i], total)
            for r in range(rows):
                out[top + r, 3 * i] = _level(total[r])
                out[top + r, 3 * i + 1] = _level(total[_ROWS + r])
                out[top + r, 3 * i + 2] = _level(total[2 * _ROWS + r])


@_compiled
def _along_columns(
    rows: NDArray[np.uint8],
    out: NDArray[np.uint8],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
    weights: NDArray[np.int32],
) -> None:
    total = np.empty(rows.shape[1], np.int32)
    for i in range(len(first)):
        _add_up(rows, first[i], count[i], weights[i], total)
        for x in range(len(total)):
            out[i, x] = _level(total[x])


@_compiled
def _add_up(
    rows: NDArray[np.uint8],
    first: int,
    count: int,
    weights: NDArray[np.int32],
    total: NDArray[np.int32],
) -> None:
    """total[:] = half a level + the sum over k of weights[k] * rows[first + k]."""
    total[:] = _HALF
    for k in range(count):
        weight, row = weights[k], rows[first + k]
        for x in range(len(total)):
            total[x] += weight * np.int32(row[x])


@_compiled
def _level(total: int) -> np.uint8:
    return np.uint8(min(max(total >> _BITS, 0), 255))
