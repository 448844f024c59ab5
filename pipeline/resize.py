"""Crop and resize one image on the CPU, compiled and without the GIL: antialiased bicubic as in
PIL, bit for bit equal to PyTorch's uint8 `interpolate(..., antialias=True)`, in integers as there.

PyTorch's function takes 1.4 times as long, holds the GIL between its calls, and has no fractional
boxes.
"""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.compiling import njit

_LANES = 32  # rows that are resized together, one in each lane of a vector register

_compiled = njit(nogil=True, cache=True)


@_compiled
def resize(
    image: NDArray[np.uint8], box: NDArray[np.float64], flipped: bool, out: NDArray[np.uint8]
) -> None:
    """Write the `box` (x0 y0 x1 y1) of `image` uint8 [H, W, 3] to `out` uint8 [h, w, 3], mirrored
    if `flipped`. The filter sees no pixels outside the box.
    """
    height, width, _ = out.shape
    first_x, weights_x, bits_x = _weights(box[0], box[2], width)
    first_y, weights_y, bits_y = _weights(box[1], box[3], height)
    top, bottom = math.floor(box[1]), math.ceil(box[3])
    rows = np.empty((bottom - top + weights_y.shape[1], width * 3), np.uint8)
    left, right = math.floor(box[0]), math.ceil(box[2])
    columns = np.zeros((right - left + weights_x.shape[1]) * 3 * _LANES, np.int16)
    for y in range(top, bottom, _LANES):
        y = min(y, max(top, bottom - _LANES))  # noqa: PLW2901  the last rows may be done twice
        lanes = min(_LANES, bottom - y)
        _transpose(image, y, lanes, left, right, columns)
        _horizontal(
            columns, first_x - left, weights_x, bits_x, flipped, rows[y - top : y - top + lanes]
        )
    _vertical(rows, first_y - top, weights_y, bits_y, out)


@_compiled
def _weights(
    low: float, high: float, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """For each of `size` output pixels across low..high: the first source pixel, and the weights of
    this and the following pixels (int32 [size, an even number]), in units of 2^-bits.
    """
    scale = (high - low) / size
    stretch = max(scale, 1.0)  # no smoothing when enlarging
    begin, end = math.floor(low), math.ceil(high)
    taps = math.ceil(4 * stretch)
    first = np.empty(size, np.int64)
    exact = np.zeros((size, taps + taps % 2))
    for i in range(size):
        centre = low + scale * (i + 0.5)
        first[i] = max(int(centre - 2 * stretch + 0.5), begin)
        count = min(int(centre + 2 * stretch + 0.5), end) - first[i]
        for k in range(min(count, taps)):
            exact[i, k] = _cubic(abs(k + first[i] - centre + 0.5) / stretch)
        exact[i] /= exact[i].sum()
    bits, largest = 0, exact.max()
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:  # fits 16 signed bits
        bits += 1
    whole = np.empty(exact.shape, np.int32)
    for i in range(size):
        for k in range(exact.shape[1]):
            whole[i, k] = int(exact[i, k] * (1 << bits) + math.copysign(0.5, exact[i, k]))
    return first, whole, bits


@_compiled
def _cubic(x: float) -> float:
    """Keys' kernel, a = -1/2, at a distance of x >= 0 pixels."""
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


@_compiled
def _transpose(
    image: NDArray[np.uint8], y: int, lanes: int, left: int, right: int, columns: NDArray[np.int16]
) -> None:
    """Transpose rows y .. y + lanes of `image`: columns[(x · 3 + colour) · LANES + row].

    Four rows at a time make one 64-bit word, which takes half the time of writing single values.
    """
    words = columns.view(np.uint64)
    pixels, stride = image.reshape(-1), image.shape[1] * 3
    last = y + lanes - 1
    for word in range((lanes + 3) // 4):
        begin = left * 3 + (y + 4 * word) * stride
        length = (right - left) * 3
        a = pixels[begin : begin + length]
        begin += stride * (y + 4 * word + 1 <= last)
        b = pixels[begin : begin + length]
        begin += stride * (y + 4 * word + 2 <= last)
        c = pixels[begin : begin + length]
        begin += stride * (y + 4 * word + 3 <= last)
        d = pixels[begin : begin + length]
        for x in range(length):
            words[x * (_LANES // 4) + word] = (
                np.uint64(a[x])
                | (np.uint64(b[x]) << np.uint64(16))
                | (np.uint64(c[x]) << np.uint64(32))
                | (np.uint64(d[x]) << np.uint64(48))
            )


@_compiled
def _horizontal(
    columns: NDArray[np.int16],
    first: NDArray[np.int64],
    weights: NDArray[np.int32],
    bits: int,
    flipped: bool,
    rows: NDArray[np.uint8],
) -> None:
    """Filter transposed rows horizontally into `rows` uint8 [up to LANES, w · 3]."""
    size, pixel = len(first), 3 * _LANES
    total = np.empty(pixel, np.int32)
    for i in range(size):
        total[:] = 1 << (bits - 1)
        at = first[i] * pixel
        for k in range(0, weights.shape[1], 2):  # two at a time: `total` stays in memory
            one, other = weights[i, k], weights[i, k + 1]
            source = columns[at + k * pixel : at + (k + 2) * pixel]
            for j in range(pixel):
                total[j] += one * source[j] + other * source[j + pixel]
        for j in range(pixel):
            total[j] = min(max(total[j] >> bits, 0), 255)
        x = 3 * (size - 1 - i if flipped else i)
        for lane in range(len(rows)):
            rows[lane, x] = total[lane]
            rows[lane, x + 1] = total[_LANES + lane]
            rows[lane, x + 2] = total[2 * _LANES + lane]


@_compiled
def _vertical(
    rows: NDArray[np.uint8],
    first: NDArray[np.int64],
    weights: NDArray[np.int32],
    bits: int,
    out: NDArray[np.uint8],
) -> None:
    """Filter `rows` uint8 [H, w · 3] vertically into `out` uint8 [h, w, 3]."""
    length = rows.shape[1]
    total = np.empty(length, np.int32)
    for i in range(len(out)):
        total[:] = 1 << (bits - 1)
        for k in range(0, weights.shape[1], 2):
            one, other = weights[i, k], weights[i, k + 1]
            a, b = rows[first[i] + k], rows[first[i] + k + 1]
            for x in range(length):
                total[x] += one * np.int32(a[x]) + other * np.int32(b[x])
        line = out[i].reshape(-1)
        for x in range(length):
            line[x] = min(max(total[x] >> bits, 0), 255)
