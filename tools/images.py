"""From an image file to what a beton stores: its own bytes if FFCV decodes them, else a conversion.

Every image is decoded here, so that packing finds what would fail, or silently turn grey, later.
"""

import io
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import turbojpeg

MAX_SIDE = 65535  # the beton's width and height are uint16
MAX_PIXELS = 178_956_970  # where Pillow, too, takes an image for a decompression bomb
MAX_BYTES = 1 << 30
MAX_EXTRANEOUS = 16
"""Bytes that libjpeg may find left over before a marker. Some writers pad by a few, and every block
is there; a stream that has lost its step leaves hundreds."""

_CMYK_COMPONENTS = 4
_SHRINK = 8
_thread = threading.local()


class BadImage(ValueError):
    """The file cannot be packed; the message says why, without the file's name."""


@dataclass(frozen=True)
class Record:
    """What is stored for one image."""

    data: bytes | NDArray[np.uint8]
    """A JPEG stream, or uint8 pixels [height, width, 3]."""
    height: int
    width: int
    converted: str
    """Why the file was not copied unchanged; empty where it was."""


@dataclass(frozen=True)
class JpegHeader:
    """What a JPEG's markers say before the first scan."""

    height: int
    width: int
    components: int
    orientation: int
    """EXIF orientation, 1 = upright."""


def load_record(path: Path, max_side: int | None = None, quality: int = 95) -> Record:
    """Read and verify one image file.

    A JPEG that FFCV decodes to the right picture is kept byte for byte. Anything else becomes
    upright RGB pixels, stored losslessly. An image with a side above `max_side` pixels is scaled
    down (antialiased) and stored as JPEG.

    Raises:
        BadImage: where the file is missing, damaged, or no image that can be stored.
    """
    data = _read(path)
    header = jpeg_header(data)
    obstacle = "not a JPEG" if header is None else _obstacle(data, header)
    too_large = header and max_side and max(header.height, header.width) > max_side
    if header and not obstacle and not too_large:
        return Record(data, header.height, header.width, "")
    image = _open_rgb(data, max_side)
    if max_side and max(image.size) > max_side:
        return _scaled(image, max_side, quality)
    if max(image.size) > MAX_SIDE:
        raise BadImage(f"a side of {max(image.size)} pixels; {MAX_SIDE} can be stored")
    return Record(np.asarray(image), image.height, image.width, obstacle)


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the markers of a JPEG up to its first scan; None where `data` is no JPEG at all.

    Raises:
        BadImage: where it begins as a JPEG and has no complete header.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame: tuple[int, int, int] | None = None
    orientation, position = 1, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        body = data[position + 4 : position + 2 + int.from_bytes(data[position + 2 : position + 4])]
        if marker == 0xDA and frame:  # start of scan: the header ends
            return JpegHeader(*frame, orientation)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = struct.unpack(">xHHB", body[:6])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])
        position += len(body) + 4
    raise BadImage("truncated or damaged JPEG header")


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 where it is absent or unreadable."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            offset = directory + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, offset)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _read(path: Path) -> bytes:
    try:
        if path.is_symlink() and not path.exists():
            raise BadImage("broken symbolic link")
        if not path.is_file():
            raise BadImage("not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise BadImage("larger than 1 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    if not data:
        raise BadImage("empty file")
    return data


def _obstacle(data: bytes, header: JpegHeader) -> str:
    """Why FFCV's decoder would not give the picture of this JPEG; empty where it does.

    Raises:
        BadImage: where the JPEG is damaged, so that no decoder would.
    """
    if header.height * header.width > MAX_PIXELS:
        raise BadImage(f"{header.width}x{header.height} pixels: too large")
    complaint = _decoder_complaint(data, header)
    if _is_damage(complaint):
        raise BadImage(complaint)
    if header.components == _CMYK_COMPONENTS:
        return "CMYK"
    if header.orientation != 1:
        return f"EXIF orientation {header.orientation}"
    return complaint


def _decoder_complaint(data: bytes, header: JpegHeader) -> str:
    """The first error or warning of a whole decode, or "".

    Decodes at 1/8 of the size: all of the compressed data is read and checked, few pixels are
    computed. FFCV ignores warnings: they stand for data that is missing or invalid.
    """
    if not hasattr(_thread, "decoder"):
        _thread.decoder = turbojpeg.Decoder(0)
    decoder: turbojpeg.Decoder = _thread.decoder
    height, width = -(-header.height // _SHRINK), -(-header.width // _SHRINK)
    pixels = np.empty((height, width, 4), np.uint8)
    colours = turbojpeg.CMYK if header.components == _CMYK_COMPONENTS else turbojpeg.RGB
    code = turbojpeg.decompress(
        decoder.handle, data, len(data), pixels.ctypes.data, width, 0, height, colours, 0
    )
    return decoder.error() if code else ""


def _is_damage(complaint: str) -> bool:
    if extraneous := re.search(r"(\d+) extraneous bytes", complaint):
        return int(extraneous[1]) > MAX_EXTRANEOUS
    return complaint.startswith(("Premature", "Corrupt"))


def _open_rgb(data: bytes, max_side: int | None) -> Image.Image:
    """Decode with Pillow: upright, RGB, the first frame."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels: too large")
            if max_side:  # libjpeg may halve while it decodes, down to twice the target
                image.draft(None, (2 * max_side, 2 * max_side))
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadImage(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB; transparency is dropped, as PyTorch's image folders do."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage("32-bit pixels, whose range is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(image: Image.Image, max_side: int, quality: int) -> Record:
    """Scale the longest side down to `max_side` pixels and encode as JPEG, 4:2:0 as cameras do."""
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    stream = io.BytesIO()
    small = image.resize(size, Image.Resampling.LANCZOS)
    small.save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return Record(stream.getvalue(), small.height, small.width, f"scaled to {max_side} pixels")
