"""The chunks of a PNG file that decide its pixels, and its orientation.

The other chunks hold metadata: text of any size, profiles, further frames. The decoder never sees
them, so they cannot spoil a good picture.
"""

import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.errors import BadImage
from pipeline.orientation import exif_orientation, xmp_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 200_000
"""Chunks of a file; a picture of 100 MB has about 12,000. Reading takes 2 µs a chunk."""
MAX_TEXT = 1 << 20
"""Bytes of a compressed text in which an orientation is looked for, when they are expanded."""

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_HEADER = 13  # bytes of IHDR
_XMP, _EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"


class Png(NamedTuple):
    """What a file's chunks say."""

    width: int
    height: int
    bits: int
    """Of a channel, as stored."""
    orientation: int
    """1 = upright, 2 to 8 as in EXIF."""
    animated: bool
    kept: list[tuple[int, int]]
    """Offset and length of each chunk that decides the pixels, in bytes."""


def read_png(file: BinaryIO) -> Png:
    """Read the chunks of a file that begins with `SIGNATURE`, without the pixels.

    Raises:
        BadImage: if the file begins with another chunk than a header, or has too many.
    """
    header, animated, kept = b"", False, []
    found = dict.fromkeys((b"eXIf", _EXIF, _XMP), 0)
    for kind, begin, length in _chunks(file):
        if kind in _PIXELS:
            kept.append((begin - 8, length + 12))
        if kind == b"IHDR" and not header:
            header = file.read(_HEADER)
        elif kind == b"acTL":
            animated = int.from_bytes(file.read(min(4, length))) > 1
        elif kind == b"eXIf":
            found[kind] = found[kind] or exif_orientation(file.read(length))
        elif kind in _TEXTS:
            keyword, value = _text_orientation(kind, file.read(length))
            found[keyword] = found.get(keyword) or value
    if len(header) < _HEADER or kept[0][0] != len(SIGNATURE):
        raise BadImage("damaged PNG: it has no header")
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    orientation = found[b"eXIf"] or found[_EXIF] or found[_XMP] or 1
    return Png(width, height, header[8], orientation, animated, kept)


def pixels_only(data: bytes, png: Png) -> bytes:
    """The file `data` without the chunks that decide no pixels."""
    view = memoryview(data)
    return b"".join([SIGNATURE, *(view[begin : begin + length] for begin, length in png.kept)])


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset of the content and its length in bytes, up to the end or a cut. The file stands
    at the content.
    """
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        kind, length = head[4:], int.from_bytes(head[:4])
        yield kind, position + 8, length
        if kind == b"IEND":
            return
        position += length + 12
    raise BadImage(f"a PNG of more than {MAX_CHUNKS:,} chunks")


def _text_orientation(kind: bytes, body: bytes) -> tuple[bytes, int]:
    """A text's keyword, and the orientation in it; 0 without one."""
    keyword, _, text = body.partition(b"\0")
    if keyword not in (_XMP, _EXIF):
        return keyword, 0
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]
    try:
        text = zlib.decompressobj().decompress(text, MAX_TEXT) if packed else text
        if keyword == _XMP:
            return keyword, xmp_orientation(text)
        digits = b"".join(io.BytesIO(text.lstrip(b"\n")).readlines()[2:])
        return keyword, exif_orientation(bytes.fromhex(digits.decode("ascii")))
    except (zlib.error, ValueError):
        return keyword, 0
