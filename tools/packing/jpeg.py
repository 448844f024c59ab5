"""Checks of a JPEG without decoding it: its header, and whether its scans are complete.

A file that was cut short has no end-of-image marker. A file with a hole, or with another file
inside, has markers that no scan contains, or long runs of zeros. The check runs at several GB/s.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.jpeg_parts import next_marker

_PLAIN_SAMPLING = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11", b"\x12\x11\x11")
"""Sampling factors that TurboJPEG certainly decodes: grey, 4:4:4, 4:2:2, 4:2:0 and 4:4:0."""
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BETWEEN_SCANS = (0xC4, _START_OF_SCAN, 0xDB, 0xDD, 0xFE)  # tables, scans, comments
_ZEROS = 64  # bytes; compressed pixels seldom contain longer runs, unwritten disk space does
_XMP = b"http://ns.adobe.com/xap/1.0/\0"

WHOLE, DOUBTFUL, CUT = range(3)
"""Results of `scans`: complete; only decoding can decide; no end-of-image marker."""


class BadImage(ValueError):
    """A file that cannot be packed. The message says why, without the file's name."""


@dataclass(frozen=True)
class JpegHeader:
    """The content of a JPEG's markers before the first scan."""

    height: int
    width: int
    components: int
    orientation: int
    """1 = upright, 2 to 8 as in EXIF."""
    plain: bool
    """8 bits, Huffman-coded, a common sampling: every decoder reads it."""
    scan: int
    """Offset of the first scan's marker in bytes."""


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the markers of a JPEG up to its first scan; None if `data` is not a JPEG.

    Raises:
        BadImage: if it begins like a JPEG, but its header is incomplete.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame: tuple[int, int, int] | None = None
    plain = False
    exif, xmp, position = None, None, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        body = data[position + 4 : position + 2 + int.from_bytes(data[position + 2 : position + 4])]
        if marker == _START_OF_SCAN and frame:
            return JpegHeader(*frame, exif or xmp or 1, plain, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = struct.unpack(">xHHB", body[:6])
            sampling = body[7 : 6 + 3 * frame[2] : 3]
            plain = marker in _PLAIN_FRAMES and body[0] == 8 and sampling in _PLAIN_SAMPLING
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and exif is None:
            exif = _exif_orientation(body[6:])  # further blocks continue the first
        elif marker == 0xE1 and body.startswith(_XMP):
            xmp = _xmp_orientation(body)
        position += len(body) + 4
    raise BadImage("truncated or damaged JPEG header")


def scans(data: bytes, header: JpegHeader) -> int:
    """WHOLE, DOUBTFUL or CUT, from the bytes between the first scan and the end-of-image marker.

    Bytes after that marker are ignored: some writers add padding, and cameras append previews and
    video.
    """
    return int(_walk(np.frombuffer(data, np.uint8), header.scan))


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 0 if it is absent or unreadable."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            offset = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, offset)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, offset + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 0


def _xmp_orientation(block: bytes) -> int | None:
    """The orientation in an XMP block: Adobe's programs may write only this one."""
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', block)
    return int(match[1]) if match else None


@njit(nogil=True, cache=True)
def _walk(data: NDArray[np.uint8], position: int) -> int:
    begin = position
    while True:
        position = next_marker(data, position)
        if position < 0:
            return CUT
        kind = data[position + 1]
        if kind == _END_OF_IMAGE:
            return DOUBTFUL if _has_zeros(data[begin:position]) else WHOLE
        if kind not in _BETWEEN_SCANS and not 0xE0 <= kind <= 0xEF:
            return DOUBTFUL
        if position + 4 > len(data):
            return CUT
        position += 2 + max(2, 256 * int(data[position + 2]) + int(data[position + 3]))


@njit(nogil=True, cache=True)
def _has_zeros(data: NDArray[np.uint8]) -> bool:
    """Whether _ZEROS bytes in a row are zero. Such a run contains one of every _ZEROS-th bytes, so
    only these are tested first.
    """
    for i in range(_ZEROS - 1, len(data), _ZEROS):
        if data[i] == 0:
            low, high = i, i
            while low > 0 and data[low - 1] == 0 and high - low < _ZEROS - 1:
                low -= 1
            while high + 1 < len(data) and data[high + 1] == 0 and high - low < _ZEROS - 1:
                high += 1
            if high - low == _ZEROS - 1:
                return True
    return False
