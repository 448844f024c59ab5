"""From an image file's bytes to what a beton stores: the same bytes if FFCV decodes them, else a
conversion.

A JPEG is checked by its structure: complete headers, and an end-of-image marker after the last
scan, which a file that was cut short has not. `Storage.check` "decode" also decodes each one, which
finds most damage to the data too, at 1.2 ms an image instead of 0.02.
"""

import io
import os
import re
import struct
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import turbojpeg
from pipeline.beton import MAX_PIXELS
from pipeline.manifest import CONVERTED, ORIGINAL, SCALED

MAX_SIDE = 65535  # the beton's width and height are uint16
MAX_BYTES = 1 << 30

_RGB_COMPONENTS, _CMYK_COMPONENTS = 3, 4
_PLAIN_SAMPLING = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11", b"\x12\x11\x11")
"""Sampling factors of grey, 4:4:4, 4:2:2, 4:2:0 and 4:4:0: what TurboJPEG decodes for certain."""
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_END_OF_IMAGE = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a scan; not stuffing, fill or restart
_SHRINK = 8
_thread = threading.local()


Pixels = NDArray[np.uint8]
"""An upright RGB image [height, width, 3]."""


class BadImage(ValueError):
    """The file cannot be packed; the message says why, without the file's name."""


@dataclass(frozen=True)
class Storage:
    """How images are stored, and how well they are checked."""

    store: str = "original"
    """original: JPEGs unchanged, all else as pixels. jpeg: JPEGs no larger than `max_side`
    unchanged, all else encoded. raw: pixels."""
    max_side: int | None = None
    """Larger images are scaled down to this side, in pixels, antialiased. None: never."""
    quality: int = 95
    """JPEG quality of what is encoded, 1 to 100."""
    check: str = "structure"
    """Of a JPEG that is copied: structure, or decode."""


@dataclass(frozen=True)
class Record:
    """What is stored for one image."""

    data: bytes | Pixels
    """A JPEG stream, or uint8 pixels [height, width, 3]."""
    height: int
    width: int
    how: str
    """As in the manifest: original, scaled, or "converted: <reason>"."""

    @property
    def buffer(self) -> memoryview:
        """The stored bytes."""
        if isinstance(self.data, bytes):
            return memoryview(self.data)
        return np.ascontiguousarray(self.data).reshape(-1).data


@dataclass(frozen=True)
class JpegHeader:
    """What a JPEG's markers say before the first scan."""

    height: int
    width: int
    components: int
    orientation: int
    """EXIF orientation, 1 = upright."""
    plain: bool
    """8 bits, Huffman-coded, commonly sampled, with its tables: any decoder reads it."""
    scan: int
    """Where the first scan's marker is, in bytes."""


def make_record(data: bytes, storage: Storage) -> Record:
    """Check the bytes of an image file and turn them into what is stored.

    A JPEG that FFCV decodes to the right picture is kept byte for byte. Anything else becomes
    upright RGB: pixels, which lose nothing, or a JPEG where the storage says so.

    Raises:
        BadImage: where the file is damaged, or no image that can be stored.
    """
    if not data:
        raise BadImage("empty file")
    header = jpeg_header(data)
    obstacle = "not a JPEG" if header is None else _obstacle(data, header, storage.check)
    side = storage.max_side
    too_large = header and side and max(header.height, header.width) > side
    if header and not (obstacle or too_large) and storage.store != "raw":
        return Record(data, header.height, header.width, ORIGINAL)
    plain = header and header.plain and header.components == _RGB_COMPONENTS and not obstacle
    if header and plain and not (side and max(header.height, header.width) >= 2 * side):
        pixels = _decode_jpeg(data, header)
    else:
        pixels = _open_rgb(data, side)
    how = CONVERTED + (obstacle or "decoded")
    if side and max(pixels.shape) > side:
        pixels, how = scaled(pixels, side), SCALED
    height, width, _ = pixels.shape
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"a side of {max(height, width)} pixels; {MAX_SIDE} can be stored")
    stored = encode(pixels, storage.quality) if storage.store == "jpeg" else pixels
    return Record(stored, height, width, how)


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the markers of a JPEG up to its first scan; None where `data` is no JPEG at all.

    Raises:
        BadImage: where it begins as a JPEG and has no complete header.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame: tuple[int, int, int] | None = None
    plain, tables = False, 0
    orientation, position = 1, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        body = data[position + 4 : position + 2 + int.from_bytes(data[position + 2 : position + 4])]
        if marker == 0xDA and frame:  # start of scan: the header ends
            return JpegHeader(*frame, orientation, plain and tables == 3, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = struct.unpack(">xHHB", body[:6])
            sampling = body[7 : 6 + 3 * frame[2] : 3]
            plain = marker in _PLAIN_FRAMES and body[0] == 8 and sampling in _PLAIN_SAMPLING
        elif marker in (0xC4, 0xDB):  # Huffman, quantisation
            tables |= 1 << (marker == 0xDB)
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


def _obstacle(data: bytes, header: JpegHeader, check: str) -> str:
    """Why FFCV's decoder would not give the picture of this JPEG; empty where it does.

    Raises:
        BadImage: where the JPEG is damaged, so that no decoder would.
    """
    if header.height * header.width > MAX_PIXELS:
        raise BadImage(f"{header.width}x{header.height} pixels: too large")
    if not header.height or not header.width:
        raise BadImage(f"{header.width}x{header.height} pixels")
    complaint = ""
    if not _ends(data, header.scan):
        raise BadImage("truncated JPEG: its end-of-image marker is missing")
    if check == "decode" or not header.plain:
        complaint = _decoder_complaint(data, header)
        if _is_damage(complaint):
            raise BadImage(complaint)
    if header.components == _CMYK_COMPONENTS:
        return "CMYK"
    if header.orientation != 1:
        return f"EXIF orientation {header.orientation}"
    return complaint


def _ends(data: bytes, scan: int) -> bool:
    """Whether the image that has its first scan at byte `scan` is complete.

    A file that ends with the marker is. One that does not may still be: writers pad, and cameras
    append previews and video; then the scans are walked up to the image's own end.
    """
    if data.endswith(_END_OF_IMAGE):
        return True
    position = scan
    while marker := _MARKER.search(data, position):
        if marker.group() == _END_OF_IMAGE:
            return True
        start = marker.start() + 2
        position = start + max(2, int.from_bytes(data[start : start + 2]))
    return False


def _decode_jpeg(data: bytes, header: JpegHeader) -> Pixels:
    """Decode a plain JPEG as Pillow does, in three quarters of the time."""
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    decoder = _decoder()
    code = turbojpeg.decompress(
        decoder.handle, data, len(data), pixels.ctypes.data, header.width, 0, header.height,
        turbojpeg.RGB, turbojpeg.ACCURATE_DCT,
    )  # fmt: skip
    if code and _is_damage(complaint := decoder.error()):
        raise BadImage(complaint)
    return _open_rgb(data, None) if code else pixels


def _decoder() -> turbojpeg.Decoder:
    """This thread's decoder."""
    if not hasattr(_thread, "decoder"):
        _thread.decoder = turbojpeg.Decoder(0)
    decoder: turbojpeg.Decoder = _thread.decoder
    return decoder


def _decoder_complaint(data: bytes, header: JpegHeader) -> str:
    """The first error or warning of a whole decode, or "".

    Decodes at 1/8 of the size: all of the compressed data is read and checked, few pixels are
    computed. FFCV ignores warnings: they stand for data that is missing or invalid.
    """
    decoder = _decoder()
    height, width = -(-header.height // _SHRINK), -(-header.width // _SHRINK)
    pixels = np.empty((height, width, 4), np.uint8)
    colours = turbojpeg.CMYK if header.components == _CMYK_COMPONENTS else turbojpeg.RGB
    code = turbojpeg.decompress(
        decoder.handle, data, len(data), pixels.ctypes.data, width, 0, height, colours, 0
    )
    return decoder.error() if code else ""


def _is_damage(complaint: str) -> bool:
    return not turbojpeg.is_harmless(complaint) and complaint.startswith(("Premature", "Corrupt"))


def _open_rgb(data: bytes, max_side: int | None) -> Pixels:
    """Decode with Pillow: upright, RGB, the first frame."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels: too large")
            if max_side:  # libjpeg may halve while it decodes, down to twice the target
                image.draft(None, (2 * max_side, 2 * max_side))
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        (pixels,) = re.findall(r"\d+ pixels", str(error))[:1] or ["so many pixels"]
        raise BadImage(f"{pixels}: too large") from error
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


def scaled(pixels: Pixels, max_side: int) -> Pixels:
    """Scale the longest side down to `max_side` pixels, bicubic and antialiased.

    PyTorch's kernel gives Pillow's pixels, but for rounding, in less than half of the time. It is
    imported here, since it takes two seconds and most betons are packed without scaling.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # images are spread over threads, not their rows
    from torch import from_numpy
    from torch.nn.functional import interpolate

    height, width, _ = pixels.shape
    scale = max_side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = from_numpy(pixels).permute(2, 0, 1)[None]
    small = interpolate(image, size, mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def encode(pixels: Pixels, quality: int) -> bytes:
    """A JPEG stream of `pixels`, 4:2:0 as cameras write."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()
