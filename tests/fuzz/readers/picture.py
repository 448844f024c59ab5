"""Pictures: packing and evaluation give the same verdict and the same pixels."""

import struct
from pathlib import Path

import numpy as np

from pipeline.errors import BadImage, UserError
from pipeline.images import load_rgb, load_size
from pipeline.png import SIGNATURE
from pipeline.turbojpeg import Decoder
from tests.fuzz.damage import NUMBERS, Random, damage
from tests.helpers.picture_files import chunk, files
from tools.packing.images import Storage, pack_image

CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fdAT")
MAGIC = (b"Exif\0\0II*\0", b"ihdr", b"ispe", b"irot", b"VP8X", b"\xff\x51", b"\xff\xc0", b"II*\0")


class Target:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "picture"
        self.files = list(files().values())

    def try_one(self, random: Random) -> str:
        data = self.files[random.integers(len(self.files))]
        kinds = (damage, number_of_a_header, number_after_a_name, chunks_of_a_png)
        self.path.write_bytes(data := kinds[random.integers(len(kinds))](data, random))
        try:
            pixels = load_rgb(self.path)
        except UserError as error:
            assert str(self.path) in str(error), str(error)
            assert str(error).isprintable(), repr(str(error))
            pixels = None
        try:
            packed = pack_image(data, Storage())
        except BadImage as error:
            too_long = "can be stored" in str(error)  # a side, in the format of betons
            assert pixels is None or too_long, f"packing refuses what evaluation reads: {error}"
            return "refused"
        if isinstance(packed.data, bytes):  # a copied JPEG
            stored = np.empty((packed.height, packed.width, 3), np.uint8)
            if Decoder(0).decompress(packed.data, stored):
                return "found"  # when it is decoded; --check decode refuses it
        else:
            stored = packed.data
        assert pixels is not None, "evaluation refuses what packing stores"
        assert np.array_equal(pixels, stored), "other pixels"
        assert load_size(self.path) == (packed.width, packed.height)
        return "read"


def number_of_a_header(data: bytes, random: Random) -> bytes:
    """A number that is often a limit, among the first bytes."""
    return _with_number(data, int(random.integers(min(len(data), 200))), random)


def number_after_a_name(data: bytes, random: Random) -> bytes:
    """A number soon after the name of a box, a chunk or a segment."""
    places = [at for name in MAGIC if (at := data.find(name)) >= 0]
    begin = places[random.integers(len(places))] if places else 0
    return _with_number(data, begin + int(random.integers(24)), random)


def chunks_of_a_png(data: bytes, random: Random) -> bytes:
    """Other chunks, with right checksums: repeated, exchanged, removed, of other content."""
    if not data.startswith(SIGNATURE):
        return damage(data, random)
    parts, position = [], len(SIGNATURE)
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        parts.append((data[position + 4 : position + 8], data[position + 8 :][:length]))
        position += length + 12
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(parts)))
        kind, body = parts[at]
        match random.integers(5):
            case 0:
                parts.insert(at, parts[random.integers(len(parts))])
            case 1:
                parts[at] = (kind, damage(body, random))
            case 2:
                parts[at] = (CHUNKS[random.integers(len(CHUNKS))], body)
            case 3:
                parts.insert(at, (CHUNKS[random.integers(len(CHUNKS))], random.bytes(20)))
            case 4 if len(parts) > 1:
                del parts[at]
    return SIGNATURE + b"".join(chunk(*part) for part in parts)


def _with_number(data: bytes, begin: int, random: Random) -> bytes:
    size = int(random.choice([1, 2, 4]))
    value = NUMBERS[random.integers(len(NUMBERS))] % 256**size
    return data[:begin] + value.to_bytes(size, "big") + data[begin + size :]
