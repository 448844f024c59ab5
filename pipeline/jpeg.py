"""A JPEG's header, whether its scans are complete, and its pixels.

A file that was cut short has no end-of-image marker. A file with a hole, or with another file
inside, has markers that no scan contains, or long runs of zeros. The check runs at several GB/s.
A picture that is complete but for its end-of-image marker gets one.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import turbojpeg
from pipeline.compiling import njit
from pipeline.errors import BadImage
from pipeline.jpeg_parts import (
    HUFFMAN,
    MAX_SCANS,
    QUANTISATION,
    SCANS,
    TOO_MANY,
    missing_parts,
    next_marker,
)
from pipeline.orientation import exif_orientation, xmp_orientation

_PLAIN_SAMPLING = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11", b"\x12\x11\x11")
"""Sampling factors that TurboJPEG certainly decodes: grey, 4:4:4, 4:2:2, 4:2:0 and 4:4:0."""
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BETWEEN_SCANS = (0xC4, _START_OF_SCAN, 0xDB, 0xDD, 0xFE)  # tables, scans, comments
_FILL = re.compile(rb"\xff+")
_ZEROS = 64  # bytes; compressed pixels seldom contain longer runs, unwritten disk space does
_COLOUR_SEGMENTS = (0xE0, 0xEE)  # JFIF and Adobe say how colours are stored
CMYK_COMPONENTS = 4
_SHRINK = 8
_XMP = b"http://ns.adobe.com/xap/1.0/\0"

_SAMSUNG = b"SEFT"
_TRAILER = re.compile(
    rb"\0\0..([\x03-\x40])\0\0\0[A-Za-z][A-Za-z0-9_]{2}|"  # Samsung: two zeros, type, length, name
    rb"SEFH.\0\0\0|MotionPhoto_Data|\0\0\0[\x08-\x40]ftyp",  # its table; videos
    re.DOTALL,
)
"""Where a trailer begins that phones append, some in place of the end-of-image marker."""
END_ADDED = "end-of-image marker added"

WHOLE, DOUBTFUL, CUT = range(3)
"""Results of `scans`: complete; only decoding can decide; no end-of-image marker."""


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
        if marker == 0xFF:  # fill bytes
            position = _after_fill(data, position)
            continue
        body = data[position + 4 : position + 2 + int.from_bytes(data[position + 2 : position + 4])]
        if marker == _START_OF_SCAN and frame:
            return JpegHeader(*frame, exif or xmp or 1, plain, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = struct.unpack(">xHHB", body[:6])
            sampling = body[7 : 6 + 3 * frame[2] : 3]
            plain = marker in _PLAIN_FRAMES and body[0] == 8 and sampling in _PLAIN_SAMPLING
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and exif is None:
            exif = exif_orientation(body[6:])  # further blocks continue the first
        elif marker == 0xE1 and body.startswith(_XMP):
            xmp = xmp_orientation(body)
        position += len(body) + 4
    raise BadImage("truncated or damaged JPEG header")


def _after_fill(data: bytes, position: int) -> int:
    """Offset of the marker after the fill bytes that begin at `position`."""
    fill = _FILL.match(data, position)
    assert fill
    return fill.end() - 1


def scans(data: bytes, header: JpegHeader) -> int:
    """WHOLE, DOUBTFUL or CUT, from the bytes between the first scan and the end-of-image marker.

    Bytes after that marker are ignored: some writers add padding, and cameras append previews and
    video.
    """
    return int(_walk(np.frombuffer(data, np.uint8), header.scan))


def obstacles(data: bytes, header: JpegHeader, check: str) -> tuple[bytes, list[str]]:
    """Reasons why FFCV would not decode this JPEG correctly; none if it does. They are of the
    returned bytes: `data`, or a complete picture in them with the end-of-image marker that it lacks
    or that a phone has replaced by a trailer.

    Raises:
        BadImage: if the JPEG is damaged.
    """
    if not header.height or not header.width:
        raise BadImage(f"{header.width}x{header.height} pixels")
    if (missing := missing_parts(data)) & TOO_MANY:
        raise BadImage(f"more than {MAX_SCANS} scans")
    state, complaint = scans(data, header), ""
    if state == DOUBTFUL or check == "decode" or not header.plain or missing:
        complaint = _decoder_complaint(data, header)
    # Compressed data may look like a trailer: without a doubt none is looked for.
    if state != WHOLE or complaint or data.endswith(_SAMSUNG):
        # A marker in the trailer is not the picture's.
        trailer = _TRAILER.search(data, header.scan)
        picture = data[: trailer.start()] if trailer else data
        state = scans(picture, header)
        if state == CUT:
            whole = _with_end(picture, header)
            return whole, [END_ADDED, *obstacles(whole, header, check)[1]]
    if missing & (QUANTISATION | HUFFMAN) and complaint:
        raise BadImage(f"its tables are missing ({complaint})")
    if _is_damage(complaint):
        raise BadImage(complaint)
    found = [complaint] if complaint else []
    if missing & HUFFMAN:  # libjpeg takes the standard ones, other readers those of the last image
        found.append("no Huffman tables")
    if missing & SCANS:
        found.append("scans are missing")
    if header.components == CMYK_COMPONENTS:
        found.append("CMYK")
    if header.orientation != 1:
        found.append(f"orientation {header.orientation}")
    return data, found


def _with_end(picture: bytes, header: JpegHeader) -> bytes:
    """The JPEG with an end-of-image marker. Raises BadImage if this is not all that it lacks: a
    decoder that reads the marker too early says so.
    """
    whole = picture + b"\xff\xd9"
    complete = scans(whole, header) == WHOLE and not missing_parts(whole) & SCANS
    if not complete or _decoder_complaint(whole, header):
        raise BadImage("truncated JPEG: its end-of-image marker is missing")
    return whole


def decode_jpeg(data: bytes, header: JpegHeader) -> NDArray[np.uint8] | None:
    """The stored pixels [H, W, 3] of a JPEG that is grey or of three colours: those of Pillow and
    of a beton's reader, in three quarters of Pillow's time. None if libjpeg complains.

    Raises:
        BadImage: if the JPEG is damaged.
    """
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    complaint = turbojpeg.Decoder(0).decompress(data, pixels)
    if _is_damage(complaint):
        raise BadImage(complaint)
    return None if complaint else pixels


def _decoder_complaint(data: bytes, header: JpegHeader) -> str:
    """The first error or warning when the whole JPEG is decoded, or "".

    Decodes at 1/8 of the size: this reads and checks all of the compressed data, but computes few
    pixels. A warning means missing or invalid data; FFCV ignores warnings.
    """
    height, width = -(-header.height // _SHRINK), -(-header.width // _SHRINK)
    cmyk = header.components == CMYK_COMPONENTS
    pixels = np.empty((height, width, 4 if cmyk else 3), np.uint8)
    colours = turbojpeg.CMYK if cmyk else turbojpeg.RGB
    return turbojpeg.Decoder(0).decompress(data, pixels, colours)


def _is_damage(complaint: str) -> bool:
    return not turbojpeg.is_harmless(complaint) and complaint.startswith(("Premature", "Corrupt"))


def without_metadata(data: bytes, header: JpegHeader) -> bytes:
    """The JPEG without the segments before its first scan that decide no pixels."""
    kept, position = [data[:2]], 2
    while position < header.scan:
        if data[position + 1] == 0xFF:
            position = _after_fill(data, position)
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if not 0xE0 <= data[position + 1] <= 0xEF or data[position + 1] in _COLOUR_SEGMENTS:
            kept.append(data[position:end])
        position = max(end, position + 4)
    return b"".join([*kept, data[header.scan :]])


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
