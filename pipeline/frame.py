"""The frame of a JPEG whose coefficients one scan holds, for code that works on its parts: compiled
and without the GIL.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAX_COMPONENTS = 4
DCT = 8  # pixels of a block's side


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


@njit(nogil=True, cache=True)
def frame_of(data: NDArray[np.uint8]) -> Frame:
    """The frame of the JPEG in `data`."""
    sampling, tables = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)
    ids = np.zeros(MAX_COMPONENTS, np.int64)
    at, sides, interval = 2, 0, 0
    good = len(data) > 4 and data[0] == 0xFF and data[1] == 0xD8
    while good and at + 4 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        end = at + 2 + (np.int64(data[at + 2]) << 8 | data[at + 3])
        body = data[at + 4 : end]
        if end > len(data) or kind < 0xC0 or kind == 0xFF or 0xD0 <= kind <= 0xD9:
            break
        if kind == 0xC0 or kind == 0xC1:
            components = np.int64(body[5]) if len(body) > 5 else 0
            if sides or not 1 <= components <= MAX_COMPONENTS or len(body) != 6 + 3 * components:
                break
            if body[0] != 8:
                break
            sides = at + 5
            sampling, tables = (
                np.zeros((components, 2), np.int64),
                np.zeros((components, 2), np.int64),
            )
            for c in range(components):
                ids[c] = body[6 + 3 * c]
                sampling[c, 0], sampling[c, 1] = body[7 + 3 * c] >> 4, body[7 + 3 * c] & 15
        elif kind == 0xDD:
            if len(body) != 2:
                break
            interval = np.int64(body[0]) << 8 | body[1]
        elif kind == 0xDA:
            if sides and _is_whole(body, ids, tables):
                height = np.int64(data[sides]) << 8 | data[sides + 1]
                width = np.int64(data[sides + 2]) << 8 | data[sides + 3]
                return _frame(height, width, sampling, tables, interval, sides, at, end)
            break
        elif 0xC2 <= kind <= 0xCF and kind != 0xC4:
            break
        at = end
    return Frame(0, 0, sampling, tables, 0, 0, 0, 0, 0, 0, 0, 0)


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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
    mcu_width, mcu_height = DCT, DCT  # also of an image of one component, whatever its factors
    if len(sampling) > 1:
        mcu_width, mcu_height = DCT * sampling[:, 0].max(), DCT * sampling[:, 1].max()
    blocks = (sampling[:, 0] * sampling[:, 1]).sum() if len(sampling) > 1 else 1
    if width == 0 or sampling.min() < 1 or sampling.max() > 4 or blocks > 10:
        height = 0
    rows, columns = -(-height // mcu_height), -(-width // mcu_width)
    return Frame(
        height, width, sampling, tables, interval, sides, scan, data,
        mcu_height, mcu_width, rows, columns,
    )  # fmt: skip
