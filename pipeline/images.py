"""The pixels of an image file: one reader for packing, evaluation and transfer.

Pixels are upright 8-bit RGB. The orientation in the metadata is applied. Of 16-bit channels the
upper 8 bits are kept, of an animation the first frame. Transparency is dropped, CMYK is converted,
and a colour profile is ignored. Other metadata decide nothing: the decoder does not see those of a
JPEG or a PNG.

Sizes are compared with the limits before any memory is taken for the pixels.
"""

import io
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pipeline.errors import BadImage, UserError, printable
from pipeline.files import open_file
from pipeline.formats import FORMATS
from pipeline.jpeg import (
    CMYK_COMPONENTS,
    JpegHeader,
    decode_jpeg,
    jpeg_header,
    obstacles,
    without_metadata,
)
from pipeline.jpeg_parts import SCANS, missing_parts
from pipeline.orientation import exif_orientation, turned, turned_size, xmp_orientation
from pipeline.png import SIGNATURE, pixels_only, read_png

Image.MAX_IMAGE_PIXELS = None  # this module checks sizes itself
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is an error here
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)

Pixels = NDArray[np.uint8]
"""An upright RGB image [height, width, 3]."""

SLOW_PIXELS = 4_000_000
"""Pixels of a PPM file of decimal numbers, or with an odd maximum, which Pillow reads at a million
a second."""
MAX_STRIPS = 1_000_000
"""Strips or tiles of a TIFF file. Pillow takes 1 kB for each."""

_HEAD = 1 << 16  # bytes in which most JPEGs' headers end
_REASON = 120  # characters of a library's message
_SIZES = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)  # of a JPEG 2000 stream
_BITS, _WHITE, _STRIPS = 258, 262, (273, 324)
"""Tags of a TIFF: bits of a channel; 0 if zero is white; offsets of strips, of tiles."""


@dataclass(frozen=True)
class Limits:
    """The largest image file that is read."""

    max_bytes: int = 100_000_000
    """Of the file. A JPEG of 100 million pixels has 30 to 60 MB."""
    max_pixels: int = 100_000_000
    """Width times height. Decoding takes up to 30 bytes of memory for each."""

    def check_bytes(self, size: int) -> None:
        """Raises BadImage."""
        if size > self.max_bytes:
            raise BadImage(f"a file of {size:,} bytes; the limit is {self.max_bytes:,}")

    def check_pixels(self, width: int, height: int) -> None:
        """Raises BadImage."""
        if width * height > self.max_pixels:
            raise BadImage(
                f"{width}x{height} pixels: {width * height:,}; the limit is {self.max_pixels:,}"
            )


LIMITS = Limits()


def load_rgb(path: Path) -> Pixels:
    """The pixels of an image file. Raises UserError, naming the file."""
    with named(path):
        return read_rgb(read_file(path))


def load_size(path: Path) -> tuple[int, int]:
    """Width and height of the pixels that `load_rgb` returns, from the file's header. Raises
    UserError, naming the file.
    """
    with named(path), open_image(path, LIMITS) as file:
        return _size(file)


def read_rgb(data: bytes, limits: Limits = LIMITS) -> Pixels:
    """The pixels of the bytes of an image file. Raises BadImage."""
    data, header, _ = examine(data, limits)
    return decode(data, header, limits)[0]


def examine(
    data: bytes, limits: Limits = LIMITS, check: str = "structure"
) -> tuple[bytes, JpegHeader | None, list[str]]:
    """The bytes to decode, the header of a JPEG, and the reasons why FFCV would not decode the file
    correctly. No header for another format, which `decode` examines. The bytes are `data`, or those
    of a JPEG whose picture is complete but for its end-of-image marker, with this marker.

    Raises:
        BadImage: if the JPEG is damaged or beyond the limits.
    """
    if not data:
        raise BadImage("empty file")
    limits.check_bytes(len(data))
    header = jpeg_header(data)
    if header is None:
        return data, None, []
    limits.check_pixels(header.width, header.height)
    data, reasons = obstacles(data, header, check)
    return data, header, reasons


def decode(
    data: bytes, header: JpegHeader | None, limits: Limits = LIMITS, max_side: int | None = None
) -> tuple[Pixels, list[str]]:
    """The pixels, and what the conversion of another format than JPEG changes.

    Args:
        header: as `examine` returns it.
        max_side: of a JPEG whose longer side is at least twice this many pixels, libjpeg may halve
            the sides while it decodes, down to twice this.

    Raises:
        BadImage: if the file is damaged, beyond the limits, or of no known format.
    """
    if header is None:
        return _decode_other(data, limits)
    pixels = None
    halve = max_side and max(header.height, header.width) >= 2 * max_side
    complete = not missing_parts(data) & SCANS  # Pillow decides what the others show
    if complete and not halve and header.components != CMYK_COMPONENTS:
        pixels = decode_jpeg(data, header)
    if pixels is None:
        with _opened(io.BytesIO(without_metadata(data, header)), limits) as image:
            if max_side:
                image.draft(None, (2 * max_side, 2 * max_side))
            pixels = np.array(image.convert("RGB"))
    return turned(pixels, header.orientation), []


def open_stored(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """The image in a file as it is stored, neither turned nor converted: of a label map. Its pixels
    are decoded when they are first used, inside `named`.

    Raises:
        BadImage: if it cannot be opened, or is beyond the limits.
    """
    orientation = 1
    if data[:3] == b"\xff\xd8\xff" and (header := jpeg_header(data)):
        data, orientation = without_metadata(data, header), header.orientation
    elif data.startswith(SIGNATURE):
        png = read_png(io.BytesIO(data))
        data, orientation = pixels_only(data, png), png.orientation
    if orientation != 1:
        raise BadImage(f"its metadata turn it (orientation {orientation}): store it upright")
    with _opened(io.BytesIO(data), limits, close=False) as image:
        return image


def read_file(path: str | Path, limits: Limits = LIMITS) -> bytes:
    """All bytes of an image file.

    Raises:
        BadImage: if the file cannot be read, is not a regular file, or is too large.
    """
    with open_image(path, limits) as file:
        return file.read()


@contextmanager
def open_image(path: str | Path, limits: Limits = LIMITS) -> Iterator[BinaryIO]:
    """An image file, open to be read. Raises BadImage as `read_file`, also for errors inside."""
    try:
        with open_file(path) as stream:
            limits.check_bytes(os.fstat(stream.fileno()).st_size)
            yield stream
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and os.path.islink(path)  # noqa: PTH114
        raise BadImage("broken symbolic link" if broken else error.strerror or "?") from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns a BadImage, or any error of the image library, into a UserError with the path."""
    try:
        with _one_line():
            yield
    except BadImage as error:
        raise UserError(f"{printable(str(path))}: {error}") from None


@contextmanager
def _one_line() -> Iterator[None]:
    """Turns any error of the image library into a BadImage of one line."""
    try:
        yield
    except (BadImage, UserError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise many types of error on damaged files
        reason = printable(" ".join(str(error).split())[:_REASON]) or type(error).__name__
        raise BadImage(f"damaged image: {reason}") from error


@contextmanager
def _opened(file: BinaryIO, limits: Limits, close: bool = True) -> Iterator[Image.Image]:
    """The image that Pillow opens, within the limits. Raises BadImage, also for errors inside."""
    with _one_line():
        _check_tiff(file)
        image = Image.open(file, formats=FORMATS)
        try:
            limits.check_pixels(*image.size)
            slow = image.format == "PPM" and image.tile[0][0] != "raw"
            if slow and image.width * image.height > SLOW_PIXELS:
                raise BadImage(
                    f"{image.width}x{image.height} pixels in a PPM of decimal numbers or an odd"
                    f" maximum; the limit is {SLOW_PIXELS:,}"
                )
            yield image
        finally:
            if close:
                image.close()


def _decode_other(data: bytes, limits: Limits) -> tuple[Pixels, list[str]]:
    """`decode` of another format than JPEG."""
    sixteen, animated, orientation = False, False, 1
    if data.startswith(SIGNATURE):
        png = read_png(io.BytesIO(data))
        limits.check_pixels(png.width, png.height)
        data = pixels_only(data, png)
        sixteen, animated, orientation = png.bits == 16, png.animated, png.orientation
    for (sizes,) in (match.groups() for match in _SIZES.finditer(data[: 1 << 20])):
        right, bottom, left, top = struct.unpack(">4I", sizes)  # the stream's size, not the box's
        limits.check_pixels(max(0, right - left), max(0, bottom - top))
    with _opened(io.BytesIO(data), limits) as image:
        changes = [image.format or "?"]
        orientation = max(orientation, _orientation(image))
        sixteen |= image.mode.startswith("I;16")
        transparent = "A" in image.getbands() or "transparency" in image.info
        pixels = np.array(_to_rgb(image))
        animated |= getattr(image, "is_animated", False)
        changes += ["upper 8 of 16 bits"] * sixteen
        changes += ["transparency dropped"] * transparent
        changes += ["first of several frames"] * animated
        changes += [f"orientation {orientation}"] * (orientation > 1)
        return turned(pixels, orientation), changes


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB. Drops transparency, like PyTorch's image folders."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow expands the values of every format but TIFF to 16 bits.
        stored = 16
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            stored = image.tag_v2.get(_BITS, (16,))[0]
        values = np.asarray(image) >> (stored - 8)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_WHITE) == 0:
            values = 255 - values  # zero is white; Pillow inverts 8 bits alone
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage("32-bit pixels, whose range is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The orientation of a WebP or AVIF file; 1 for a TIFF file, which Pillow turns itself."""
    if image.format not in ("WEBP", "AVIF"):
        return 1
    exif, xmp = (image.info.get(name) or b"" for name in ("exif", "xmp"))
    return exif_orientation(exif) or xmp_orientation(xmp) or 1


def _size(file: BinaryIO) -> tuple[int, int]:
    """Width and height of an open image file as it is shown."""
    head = file.read(_HEAD)
    if not head:
        raise BadImage("empty file")
    if head.startswith(b"\xff\xd8\xff"):
        try:
            header = jpeg_header(head)
        except BadImage:  # a long one, or a damaged one
            header = jpeg_header(head + file.read())
        if header is None:
            raise BadImage("not an image of a known format")
        return turned_size(header.width, header.height, header.orientation)
    file.seek(0)
    if head.startswith(SIGNATURE):
        png = read_png(file)
        return turned_size(png.width, png.height, png.orientation)
    with _opened(file, LIMITS) as image:
        return turned_size(image.width, image.height, _orientation(image))


def _check_tiff(file: BinaryIO) -> None:
    """Raises BadImage if a TIFF file's first directory lists too many strips or tiles."""
    head = file.read(8)
    file.seek(0)
    if head[:4] in (b"II+\0", b"MM\0+"):
        raise BadImage("a BigTIFF, which is not read: convert it")
    if head[:4] not in (b"II*\0", b"MM\0*") or len(head) < 8:
        return
    order = "<" if head[:1] == b"I" else ">"
    file.seek(struct.unpack(order + "4xI", head)[0])
    count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
    table = file.read(12 * count)
    file.seek(0)
    for offset in range(0, len(table) - 11, 12):
        tag, count = struct.unpack_from(order + "H2xI", table, offset)
        if tag in _STRIPS and count > MAX_STRIPS:
            raise BadImage(f"a TIFF of {count:,} strips; the limit is {MAX_STRIPS:,}")
