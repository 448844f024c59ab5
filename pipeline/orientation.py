"""How a picture is turned before it is shown: the orientation in its metadata, 1 to 8 as in EXIF.

A damaged entry elsewhere in the metadata changes nothing, as in browsers.
"""

import re
import struct

import numpy as np
from numpy.typing import NDArray

_TAG, _LONG = 0x0112, 4


def exif_orientation(block: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 0 if it is absent or unreadable."""
    tiff = block.removeprefix(b"Exif\0\0")
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            offset = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, offset)
            if tag == _TAG:
                form = "I" if kind == _LONG else "H"
                (value,) = struct.unpack_from(order + form, tiff, offset + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 0


def xmp_orientation(block: bytes) -> int:
    """The orientation in an XMP block, which Adobe's programs may write alone; 0 without one."""
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', block)
    return int(match[1]) if match else 0


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels [H, W, 3] as they are shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """The width and height at which a picture is shown."""
    return (height, width) if orientation >= 5 else (width, height)
