"""Only the tiles that a pair of crops needs: parts of a JPEG with restart markers, put together to
smaller JPEGs. Compiled and without the GIL.

A tile is what stands between two restart markers: a row's MCUs, or an n-th of them. Each can be
decoded without the others. Where chroma has fewer pixels than luma, the decoder interpolates it
from its neighbours, so the pixels at the edge of the selected tiles differ from those of the whole
image: there the selection has a margin, and is one rectangle for crops that meet.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.compiling import njit
from pipeline.turbojpeg import (
    FLAGS,
    RGB,
    c_crc32,
    c_decompress,
    c_memchr,
    c_memcpy,
    c_pread,
    renew,
)

MOST_RECTANGLES = 4

_CALL = 5  # tiles that can be decoded in the time that a call of the decoder takes besides
_FACTORS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""Luma's sampling factors that are known, where chroma's are 1."""

_MOST_COMPONENTS = 4
_DCT = 8  # pixels of a block's side
_compiled = njit(nogil=True, cache=True)


class Frame(NamedTuple):
    """What the markers before the scan say, and where the scan is."""

    height: int
    """0 if this is not a JPEG of one Huffman-coded scan, baseline or extended, of 8 bits."""
    width: int
    sampling: NDArray[np.int64]
    """[components, 2]: horizontal and vertical factor."""
    tables: NDArray[np.int64]
    """[components, 2]: Huffman table of the DC values, of the AC values."""
    interval: int
    """MCUs between two restart markers; 0 without."""
    sides: int
    """Offset of the height, which the width follows."""
    scan: int
    """Offset of the marker of the scan."""
    data: int
    """Offset of the entropy-coded data."""
    mcu_height: int
    mcu_width: int
    """In pixels."""
    rows: int
    columns: int
    """Of MCUs."""


@_compiled
def frame_of(data: NDArray[np.uint8]) -> Frame:
    """The frame of the JPEG in `data`."""
    sampling, tables = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)
    ids = np.zeros(_MOST_COMPONENTS, np.int64)
    at, sides, interval = 2, 0, 0
    good = len(data) > 4 and data[0] == 0xFF and data[1] == 0xD8
    while good and at + 4 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        end = at + 2 + _word(data, at + 2)
        body = data[at + 4 : end]
        if end > len(data) or kind < 0xC0 or kind == 0xFF or 0xD0 <= kind <= 0xD9:
            break
        if kind == 0xC0 or kind == 0xC1:
            components = np.int64(body[5]) if len(body) > 5 else 0
            possible = 1 <= components <= _MOST_COMPONENTS and len(body) == 6 + 3 * components
            if sides or not possible or body[0] != 8:
                break
            sides = at + 5
            sampling = np.zeros((components, 2), np.int64)
            tables = np.zeros((components, 2), np.int64)
            for c in range(components):
                ids[c] = body[6 + 3 * c]
                sampling[c, 0], sampling[c, 1] = body[7 + 3 * c] >> 4, body[7 + 3 * c] & 15
        elif kind == 0xDD:
            if len(body) != 2:
                break
            interval = _word(body, 0)
        elif kind == 0xDA:
            if sides and _is_whole(body, ids, tables):
                height, width = _word(data, sides), _word(data, sides + 2)
                return _frame(height, width, sampling, tables, interval, sides, at, end)
            break
        elif 0xC2 <= kind <= 0xCF and kind != 0xC4:
            break
        at = end
    return Frame(0, 0, sampling, tables, 0, 0, 0, 0, 0, 0, 0, 0)


@_compiled
def _word(data: NDArray[np.uint8], at: int) -> int:
    """A number of two bytes."""
    return int(np.int64(data[at])) << 8 | int(data[at + 1])


@_compiled
def _is_whole(body: NDArray[np.uint8], ids: NDArray[np.int64], tables: NDArray[np.int64]) -> bool:
    """Whether a scan's header names all components, in order, and all coefficients. Notes their
    `tables`.
    """
    components = len(tables)
    if len(body) != 4 + 2 * components or body[0] != components:
        return False
    for c in range(components):
        if body[1 + 2 * c] != ids[c] or body[2 + 2 * c] & 0xCC:
            return False
        tables[c, 0], tables[c, 1] = body[2 + 2 * c] >> 4, body[2 + 2 * c] & 15
    return body[-3] == 0 and body[-2] == 63 and body[-1] == 0


@_compiled
def _frame(
    height: int,
    width: int,
    sampling: NDArray[np.int64],
    tables: NDArray[np.int64],
    interval: int,
    sides: int,
    scan: int,
    data: int,
) -> Frame:
    """The frame with its MCUs; of height 0 if a size is impossible."""
    across, down, blocks, least = 1, 1, 0, 4  # largest factors, blocks of an MCU, smallest factor
    for c in range(len(sampling)):
        h, v = sampling[c, 0], sampling[c, 1]
        across, down, blocks, least = max(across, h), max(down, v), blocks + h * v, min(least, h, v)
    if width == 0 or least < 1 or across > 4 or down > 4 or (blocks > 10 and len(sampling) > 1):
        height = 0
    if len(sampling) == 1:
        across, down = 1, 1
    mcu_height, mcu_width = _DCT * down, _DCT * across
    rows, columns = -(-height // mcu_height), -(-width // mcu_width)
    return Frame(
        height, width, sampling, tables, interval, sides, scan, data,
        mcu_height, mcu_width, rows, columns,
    )  # fmt: skip


class Grid(NamedTuple):
    """The tiles of an image."""

    rows: int
    """0 if the image cannot be taken apart."""
    columns: int
    height: int
    width: int
    """Pixels of a tile."""
    margin: int
    """Pixels around a crop that must be decoded too."""


@_compiled
def grid_of(frame: Frame) -> Grid:
    """The tiles of a JPEG with this frame."""
    sampling = frame.sampling
    known, subsampled = len(sampling) == 1, False
    if (
        len(sampling) == 3
        and sampling[1, 0] * sampling[1, 1] * sampling[2, 0] * sampling[2, 1] == 1
    ):
        subsampled = sampling[0, 0] * sampling[0, 1] > 1
        for across, down in _FACTORS:
            known |= sampling[0, 0] == across and sampling[0, 1] == down
    if not (known and frame.height and frame.interval and frame.columns % frame.interval == 0):
        return Grid(0, 0, 0, 0, 0)
    columns = frame.columns // frame.interval
    return Grid(
        frame.rows, columns, frame.mcu_height, frame.mcu_width * frame.interval, int(subsampled)
    )


@_compiled
def find_tiles(data: NDArray[np.uint8], begin: int, starts: NDArray[np.int64]) -> bool:
    """Note where each tile begins, and last where one after the last would: int64 [tiles + 1].

    False unless the data from `begin` on has exactly these tiles, with restart markers in order
    between them and the end-of-image marker behind them.
    """
    tiles, last, base = 0, len(data) - 1, data.ctypes.data
    starts[0] = begin
    while begin < last:
        at = c_memchr(base + begin, 0xFF, last - begin) - base
        if at < 0:
            break
        begin = at + 2
        after = data[at + 1]
        if after == 0:
            continue
        tiles += 1
        starts[tiles] = begin
        if tiles == len(starts) - 1:
            return after == 0xD9
        if after != 0xD0 + (tiles - 1) % 8:
            break
    return False


@_compiled
def rectangles_of(
    grid: Grid, boxes: NDArray[np.float64], scale: int, rectangles: NDArray[np.int64]
) -> int:
    """Write the `rectangles` int64 [MOST_RECTANGLES, 4] of tiles (column, row, column and row after
    the last) that hold two crops `boxes` [2, 4] (x0 y0 x1 y1, in pixels of the image), if the image
    is decoded at 1/`scale` of its sides. Returns their number.
    """
    a, b = _tiles_of(grid, boxes, 0, scale), _tiles_of(grid, boxes, 1, scale)
    apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    count = 0
    if grid.margin == 0:
        count = _bands(a, b, rectangles)
    elif apart:  # else one's inexact edge would be written over the other
        count = _append(rectangles, _append(rectangles, 0, *a), *b)
    cost = _CALL * (count - 1)
    for k in range(count):
        x0, y0, x1, y1 = rectangles[k]
        cost += (x1 - x0) * (y1 - y0)
    x0, y0, x1, y1 = min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
    if count and cost < (x1 - x0) * (y1 - y0):
        return count
    return _append(rectangles, 0, x0, y0, x1, y1)


@_compiled
def _tiles_of(
    grid: Grid, boxes: NDArray[np.float64], v: int, scale: int
) -> tuple[int, int, int, int]:
    """The rectangle of tiles that holds the pixels of crop `v`."""
    x0, x1 = _span(boxes[v, 0], boxes[v, 2], scale, grid.margin, grid.width, grid.columns)
    y0, y1 = _span(boxes[v, 1], boxes[v, 3], scale, grid.margin, grid.height, grid.rows)
    return x0, y0, x1, y1


@_compiled
def _span(
    low: float, high: float, scale: int, margin: int, side: int, count: int
) -> tuple[int, int]:
    """The first of `count` tiles with this side that a crop needs, and the one after the last."""
    first = (math.floor(low / scale) - margin) * scale // side
    after = -(-(math.ceil(high / scale) + margin) * scale // side)
    first = min(max(first, 0), count - 1)
    return first, min(max(after, first + 1), count)


@_compiled
def _bands(
    a: tuple[int, int, int, int], b: tuple[int, int, int, int], rectangles: NDArray[np.int64]
) -> int:
    """Cut two rectangles of tiles into ones that do not overlap, up to three above each other and
    one beside them; returns their number.
    """
    count = 0
    inner, outer = max(a[1], b[1]), min(a[3], b[3])
    low, high = min(inner, outer), max(inner, outer)
    for top, bottom in ((min(a[1], b[1]), low), (low, high), (high, max(a[3], b[3]))):
        in_a, in_b = a[1] <= top < a[3], b[1] <= top < b[3]
        if top == bottom or not (in_a or in_b):
            continue
        left, right = (a, b) if in_a and (a[0] <= b[0] or not in_b) else (b, a)
        beside = in_a and in_b and right[0] > left[2]
        end = max(left[2], right[2]) if in_a and in_b and not beside else left[2]
        count = _append(rectangles, count, left[0], top, end, bottom)
        if beside:
            count = _append(rectangles, count, right[0], top, right[2], bottom)
    return count


@_compiled
def _append(rectangles: NDArray[np.int64], count: int, x0: int, y0: int, x1: int, y1: int) -> int:
    """Add a rectangle; returns the new number."""
    rectangles[count, 0], rectangles[count, 1] = x0, y0
    rectangles[count, 2], rectangles[count, 3] = x1, y1
    return count + 1


@_compiled
def put_together(
    data: NDArray[np.uint8],
    frame: Frame,
    grid: Grid,
    starts: NDArray[np.int64],
    rectangle: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> int:
    """Write the JPEG of a rectangle of tiles to `out`, and return its bytes: fewer than `data`."""
    size = _header(data, frame, grid, rectangle, out)
    number = 0
    for row in range(rectangle[1], rectangle[3]):
        first, after = row * grid.columns + rectangle[0], row * grid.columns + rectangle[2]
        at = size - starts[first]
        size = _copy(data, starts[first], starts[after], out, size)
        for tile in range(first + 1, after + 1):
            out[at + starts[tile] - 1] = 0xD0 + number % 8  # the marker behind each tile
            number += 1
    out[size - 1] = 0xD9
    return size


@_compiled
def _copy(data: NDArray[np.uint8], begin: int, end: int, out: NDArray[np.uint8], size: int) -> int:
    """Append bytes to the `size` that `out` has; returns the new size."""
    c_memcpy(out.ctypes.data + size, data.ctypes.data + begin, end - begin)
    return size + end - begin


@_compiled
def _header(
    data: NDArray[np.uint8],
    frame: Frame,
    grid: Grid,
    rectangle: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> int:
    """Write the segments before the scan that decide pixels, with the rectangle's height and width;
    returns their bytes.
    """
    size, at = _copy(data, 0, 2, out, 0), 2
    while at < frame.data:
        end = at + 2 + _word(data, at + 2)
        kind = data[at + 1]
        # Of the other segments only JFIF's and Adobe's say how colours are stored.
        if kind < 0xE0 or kind == 0xE0 or kind == 0xEE:
            size = _copy(data, at, end, out, size)
            if at < frame.sides < end:
                height, width = size_of(frame, grid, rectangle)
                sides = size - (end - frame.sides)
                out[sides], out[sides + 1] = height >> 8, height & 255
                out[sides + 2], out[sides + 3] = width >> 8, width & 255
        at = end
    return size


@_compiled
def size_of(frame: Frame, grid: Grid, rectangle: NDArray[np.int64]) -> tuple[int, int]:
    """Height and width of a rectangle of tiles in pixels."""
    bottom = min(rectangle[3] * grid.height, frame.height)
    right = min(rectangle[2] * grid.width, frame.width)
    return bottom - rectangle[1] * grid.height, right - rectangle[0] * grid.width


@_compiled
def decode_crops(
    file: int,
    record: NDArray[np.int64],
    checksum: int,
    handle: NDArray[np.int64],
    scratch: NDArray[np.uint8],
    part: NDArray[np.uint8],
    canvas: NDArray[np.uint8],
    scale: int,
    boxes: NDArray[np.float64],
) -> bool:
    """Read a record, and decode the tiles that two crops `boxes` [2, 4] need to their place in
    `canvas` uint8 [H, W, 3], the whole image at 1/`scale`. The other arguments are those of
    `pipeline.turbojpeg.decode_records`; `scratch` and `part` have room for the record.

    False if the record has no tiles, or if anything is wrong with it: only decoding the whole image
    shows what. The canvas may have changed.
    """
    data = scratch[: record[1]]
    if c_pread(file, data.ctypes.data, len(data), record[0]) != len(data):
        return False
    frame = frame_of(data)
    grid = grid_of(frame)
    tiles = grid.rows * grid.columns
    right_size = frame.height == record[2] and frame.width == record[3]
    if c_crc32(0, data.ctypes.data, len(data)) != checksum or not right_size:
        return False
    starts = np.empty(min(tiles, len(data)) + 1, np.int64)
    if tiles == 0 or not find_tiles(data, frame.data, starts):
        return False
    stride, rectangles = canvas.shape[1] * 3, np.empty((MOST_RECTANGLES, 4), np.int64)
    for k in range(rectangles_of(grid, boxes, scale, rectangles)):
        size = put_together(data, frame, grid, starts, rectangles[k], part)
        height, width = size_of(frame, grid, rectangles[k])
        y, x = rectangles[k, 1] * grid.height // scale, rectangles[k, 0] * grid.width // scale
        renew(handle)
        if c_decompress(
            handle[0], part.ctypes.data, size, canvas.ctypes.data + y * stride + 3 * x,
            -(-width // scale), stride, -(-height // scale), RGB, FLAGS,
        ):  # fmt: skip
            return False
    return True
