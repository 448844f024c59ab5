"""JPEGs: packing, reading and Pillow agree on each altered one, in any order among others."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import BadImage
from pipeline.ffcv_format import JPEG
from pipeline.jpeg import jpeg_header
from pipeline.turbojpeg import Decoder
from tests.fuzz.damage import Random, damage
from tests.helpers.jpegs import HEIGHT, WIDTH, jpeg, pool, segments
from tools.packing.images import Packed, Storage, pack_image

LARGE = 1 << 21
"""Pixels: a stream that claims more is only packed, not compared, so that an input stays fast."""
ROOM = 1 << 16  # bytes of an altered stream
SLOT = 0
"""The record that holds the altered stream."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Target:
    """A beton of good streams, and room for an altered one."""

    def __init__(self, folder: Path) -> None:
        kinds = [
            jpeg(1, quality=90),
            jpeg(2, quality=95, subsampling=0, optimize=True),
            jpeg(3, "L", quality=80),
            jpeg(4, "CMYK", quality=80),
            jpeg(5, quality=85, progressive=True),
            jpeg(6, "L", progressive=True, quality=40),
            jpeg(7, quality=90, restart_marker_blocks=2),
            jpeg(8, quality=60, subsampling=1, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        ]
        self.streams = kinds + list(pool().values())
        good = [jpeg(9, quality=7), jpeg(10, optimize=True, quality=98), *kinds[4:5]]
        path = folder / "streams.beton"
        with BetonWriter(path, 1 + len(good)) as writer:
            writer.append([Sample(bytes(ROOM), HEIGHT, WIDTH, (SLOT,))])
            writer.append([Sample(s, HEIGHT, WIDTH, (1 + i,)) for i, s in enumerate(good)])
        self.beton = Beton(path)
        self.room = os.open(path, os.O_WRONLY)
        self.truth = [_pillow(stream) for stream in good]
        self.decoder = Decoder(ROOM)
        self.try_stream(self.streams[0], np.random.default_rng(0))  # compiles

    def try_one(self, random: Random) -> str:
        stream = self.streams[random.integers(len(self.streams))]
        kind = DAMAGE[random.integers(len(DAMAGE))]
        return self.try_stream(kind(stream, random)[:ROOM], random)

    def try_stream(self, stream: bytes, random: Random) -> str:
        """Pack the stream in both ways, and decode it among good ones."""
        sides = _sides(stream)
        if sides and sides[0] * sides[1] > LARGE:
            return "large"
        by_structure, by_decoding = (_pack(stream, check) for check in ("structure", "decode"))
        truth = _pillow(stream)
        alone, reason = self._among_good_ones(stream, sides or (HEIGHT, WIDTH), random)
        if by_structure is None:
            assert by_decoding is None, "a complete check accepts what the quick one refuses"
            return "refused"
        for packed in filter(None, (by_structure, by_decoding)):
            if isinstance(packed.data, bytes):
                assert packed.data == stream
                assert reason or truth is not None, "decoded, and Pillow refuses it"
                assert reason or np.array_equal(alone, truth), "other pixels than Pillow's"
            else:
                assert np.array_equal(packed.data, truth), "converted to other pixels"
        if by_decoding is None:
            stored = isinstance(by_structure.data, bytes)
            assert reason or not stored, "reading accepts what --check decode refuses"
            return "found"
        if isinstance(by_decoding.data, bytes):
            assert not reason, f"--check decode accepts it, and reading says: {reason}"
            return "read"
        return "converted"

    def _among_good_ones(
        self, stream: bytes, sides: tuple[int, int], random: Random
    ) -> tuple[np.ndarray, str]:
        """The stream's pixels and why it is refused, which are the same in each order."""
        beton = self.beton
        if not stream:
            return np.empty(0), "empty"
        os.pwrite(self.room, stream, int(beton.records[SLOT, 0]))
        beton.records[SLOT, 1:] = (len(stream), *sides, JPEG)
        alone, reason = _decode(beton, SLOT, Decoder(len(stream)))
        for i in (SLOT, *random.permutation([SLOT, SLOT, *range(1, len(beton))]).tolist()):
            pixels, why = _decode(beton, i, self.decoder)
            assert why == (reason if i == SLOT else ""), f"record {i}: {why or 'decodes'}: {reason}"
            expected = alone if i == SLOT else self.truth[i - 1]
            assert why or np.array_equal(pixels, expected), f"record {i}: pixels of another image"
        return alone, reason


def _decode(beton: Beton, i: int, decoder: Decoder) -> tuple[np.ndarray, str]:
    canvas = np.zeros((1, *beton.records[i, 2:4], 3), np.uint8)
    _, reason = beton.try_decode(np.array([i]), canvas, decoder)
    return canvas[0], reason


def _pack(stream: bytes, check: str) -> Packed | None:
    try:
        return pack_image(stream, Storage(check=check))
    except BadImage as error:
        assert str(error).isprintable() and len(str(error)) < 300, repr(str(error))
        return None


def _pillow(stream: bytes) -> np.ndarray | None:
    """Pillow's upright pixels; None if it refuses the stream."""
    try:
        with Image.open(io.BytesIO(stream)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError):
        return None


def _sides(stream: bytes) -> tuple[int, int] | None:
    try:
        header = jpeg_header(stream)
    except BadImage:
        return None
    return (header.height, header.width) if header and header.height and header.width else None


# --- damage: (stream, generator) -> stream -------------------------------------------------------


def change_a_segment(stream: bytes, random: Random) -> bytes:
    """One to four odd bytes in a table, frame or scan header."""
    parts = _parts(stream)
    at = int(random.integers(1, max(2, len(parts) - 1)))
    part = bytearray(parts[at])
    for _ in range(int(random.integers(1, 5))):
        values = [0, 1, 2, 3, 16, 17, 0x22, 63, 64, 0x80, 0xFF, int(random.integers(256))]
        part[random.integers(2, max(3, min(len(part), 40)))] = values[random.integers(len(values))]
    parts[at] = bytes(part)
    return b"".join(parts)


def arrange_segments(stream: bytes, random: Random) -> bytes:
    """A segment is lost, repeated, or moved before or behind another."""
    parts = _parts(stream)
    at, to = random.integers(1, len(parts), 2)
    match random.integers(3):
        case 0:
            del parts[at]
        case 1:
            parts.insert(int(to), parts[at])
        case 2:
            parts.insert(int(to), parts.pop(at))
    return b"".join(parts)


def graft_segments(stream: bytes, random: Random) -> bytes:
    """A table of another stream replaces one, or stands between scans."""
    others = [p for p in _parts(jpeg(11, quality=5, optimize=True)) if p[1:2] in (b"\xc4", b"\xdb")]
    parts = _parts(stream)
    at, other = int(random.integers(1, len(parts))), others[random.integers(len(others))]
    parts[at : at + int(random.integers(2))] = [other]
    return b"".join(parts)


def change_a_marker(stream: bytes, random: Random) -> bytes:
    """Another marker, also one inside or between the scans."""
    content = bytearray(stream)
    markers = [
        at for at in range(len(stream) - 1) if stream[at] == 0xFF and stream[at + 1] not in (0, 255)
    ]
    if markers:
        kinds = [0x00, 0x01, 0x77, 0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCC, 0xD0, 0xD7, 0xD8, 0xD9]
        kinds += [0xDA, 0xDB, 0xDC, 0xDD, 0xE1, 0xEE, 0xFE, int(random.integers(256))]
        content[random.choice(markers) + 1] = random.choice(kinds)
    return bytes(content)


def insert_bytes(stream: bytes, random: Random) -> bytes:
    """Padding, a marker, zeros or noise before a marker or anywhere."""
    kinds = [
        bytes(2),
        b"\xff",
        b"\xff\xd9",
        b"\xff\xd0",
        b"\xff\xd8",
        bytes(80),
        b"\xff\xdd\0\4\0\1",
    ]
    kinds += [random.bytes(int(random.integers(1, 20)))]
    ends = [at for at in range(2, len(stream)) if stream[at - 1 : at] == b"\xff"]
    at = int(random.choice(ends)) - 1 if ends and random.integers(2) else None
    at = int(random.integers(len(stream) + 1)) if at is None else at
    return stream[:at] + kinds[random.integers(len(kinds))] + stream[at:]


def damage_the_scan(stream: bytes, random: Random) -> bytes:
    begin = stream.find(b"\xff\xda")
    return stream[:begin] + damage(stream[begin:], random) if begin > 0 else damage(stream, random)


DAMAGE: tuple[Callable[[bytes, Random], bytes], ...] = (
    damage, damage_the_scan, change_a_segment, change_a_segment, arrange_segments, graft_segments,
    change_a_marker, insert_bytes,
)  # fmt: skip


def _parts(stream: bytes) -> list[bytes]:
    """The segments; some streams of the pool cannot be parsed and stay in two parts."""
    try:
        return segments(stream)
    except IndexError:
        return [stream[:2], stream[2:]]
