"""JPEG streams of tests: whole, abbreviated and damaged ones of the same picture."""

import io
from ctypes import byref, c_int, c_ulong, c_void_p, string_at
from typing import Any

import numpy as np
from PIL import Image

from pipeline import turbojpeg
from tests.helpers.betons import photograph

HEIGHT, WIDTH = 40, 56
QUANTISATION, HUFFMAN, SCAN, FRAME = 0xDB, 0xC4, 0xDA, 0xC0


def jpeg(number: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    """A stream of Pillow's, [HEIGHT, WIDTH] pixels."""
    stream = io.BytesIO()
    image = Image.fromarray(photograph(number, HEIGHT, WIDTH)).convert(mode)
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "grey": 3, "4:4:0": 4, "4:1:1": 5}
"""TurboJPEG's numbers of chroma samplings; Pillow knows three of them."""


def sampled(pixels: np.ndarray, sampling: str, quality: int = 90) -> bytes:
    """A stream of TurboJPEG's of pixels uint8 [H, W, 3]."""
    make, free = turbojpeg.lib.tjCompress2, turbojpeg.lib.tjFree
    make.argtypes = (
        c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int, c_int, c_int,
    )  # fmt: skip
    turbojpeg.lib.tjInitCompress.restype = c_void_p
    handle, made, size = turbojpeg.lib.tjInitCompress(), c_void_p(), c_ulong()
    pixels = np.ascontiguousarray(pixels)
    height, width, _ = pixels.shape
    code = make(
        handle, pixels.ctypes.data, width, 3 * width, height, turbojpeg.RGB,
        byref(made), byref(size), SAMPLINGS[sampling], quality, 0,
    )  # fmt: skip
    assert code == 0
    stream = string_at(made, size.value)
    free(made)
    turbojpeg.lib.tjDestroy(handle)
    return stream


def upright() -> bytes:
    """A stream of [160, 16] pixels whose chroma has a quarter of luma's rows (4:4:1), a sampling
    without a number: a stream of 4:1:1 that says that its MCUs are upright.
    """
    data = sampled(photograph(1, 40, 64), "4:1:1")
    sides = data.index(bytes([0xFF, FRAME])) + 5
    return data[:sides] + b"\0\xa0\0\x10\3\1\x14" + data[sides + 7 :]


def segments(data: bytes) -> list[bytes]:
    """The stream in parts: SOI, each segment before the first scan, the rest."""
    parts, at = [data[:2]], 2
    while data[at + 1] != SCAN:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def without(data: bytes, *markers: int) -> bytes:
    """The stream without the segments of these markers before its first scan."""
    first, *middle, last = segments(data)
    return first + b"".join(part for part in middle if part[1] not in markers) + last


def moved(data: bytes, marker: int) -> bytes:
    """The stream whose table of this marker has a number that no component uses."""
    at = data.index(bytes([0xFF, marker])) + 4
    return data[:at] + bytes([data[at] & 0xF0 | 3]) + data[at + 1 :]


def pool() -> dict[str, bytes]:
    """Streams by name. Those whose name begins with "bad" must be refused."""
    plain, fine = jpeg(1, quality=90), jpeg(2, quality=96, optimize=True)
    progressive = jpeg(3, quality=85, progressive=True)
    restart = jpeg(4, quality=90, restart_marker_blocks=2)
    reset = restart.index(b"\xff\xd1")
    scan = plain.index(b"\xff\xda")
    huffman = plain.index(b"\xff\xc4")
    quarter = progressive.index(b"\xff\xc4", progressive.index(b"\xff\xda"))
    return {
        "plain": plain,
        "fine": fine,
        "coarse": jpeg(5, quality=8),
        "grey": jpeg(6, "L", quality=70),
        "progressive": progressive,
        "restart": restart,
        "padded": plain[:-2] + b"\1\2\3" + plain[-2:],
        "standard Huffman tables": without(plain, HUFFMAN),
        "bad: no quantisation": without(plain, QUANTISATION),
        "bad: no tables": without(fine, QUANTISATION, HUFFMAN),
        "bad: another quantisation table": moved(plain, QUANTISATION),
        "bad: progressive without tables": without(progressive, HUFFMAN),
        "bad: progressive with a later table lost": progressive[: quarter + 1]
        + b"\xfe"
        + progressive[quarter + 2 :],
        "bad: only tables": plain[:2]
        + b"".join(part for part in segments(plain)[1:-1] if part[1] in (QUANTISATION, HUFFMAN))
        + b"\xff\xd9",
        "bad: a flipped bit in a table": plain[: huffman + 10]
        + bytes([plain[huffman + 10] ^ 0x80])
        + plain[huffman + 11 :],
        "bad: an unknown marker": plain[: huffman + 1] + b"\x77" + plain[huffman + 2 :],
        "bad: cut": plain[: scan + 200],
        "bad: cut in its header": plain[:huffman],
        "bad: no beginning": bytes(20) + plain[20:],
        "bad: bytes before a restart hide a cut": restart[:reset] + b"\0\0" + restart[reset:-120],
        "bad: another size": jpeg(1)[:2] + jpeg(1)[2:].replace(b"\0\x28\0\x38", b"\0\x28\0\x48"),
    }
