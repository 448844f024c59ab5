"""Which storage fits a given disk or memory, estimated from a sample of the images."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline import turbojpeg
from pipeline.beton_writer import DEFAULT_PAGE_SIZE
from pipeline.errors import UserError
from pipeline.parallel import ordered_map
from tools.packing.images import Record, Storage, make_record
from tools.packing.jpeg import BadImage

SAMPLE = 256
SIDES = (None, 2048, 1536, 1280, 1024, 896, 768, 640, 512, 448, 384, 320, 256, 224, 192, 160, 128)
_ENTRY = 80  # bytes of an image in the tables


class Choice(NamedTuple):
    """A storage, and what it would come to."""

    storage: Storage
    bytes: int
    """Of the beton, with twice the sample's standard error on top."""
    images_per_s: float
    """Decoded by one core, measured on the sample."""


def choose(files: Sequence[bytes], count: int, budget: int, base: Storage, workers: int) -> Choice:
    """The largest side at which `count` images like those in `files` fit `budget` bytes; there as
    pixels if they fit, else as JPEG.

    Raises:
        UserError: where not even the smallest side fits.
    """
    originals = _records(files, replace(base, store="original"), workers)
    if not originals:
        raise UserError("--store auto: none of the images of the sample can be read")
    for side in SIDES:
        raw = [3 * math.prod(_scaled_size(record, side)) for record in originals]
        if (size := _estimate(raw, count)) <= budget:
            storage = replace(base, store="raw", max_side=side)
            return Choice(storage, size, _decode_rate(_records(files[:64], storage, 1)))
        storage = replace(base, store="jpeg" if side else "original", max_side=side)
        records = _records(files, storage, workers) if side else originals
        stored = [record.buffer.nbytes for record in records]
        if (size := _estimate(stored, count)) <= budget:
            return Choice(storage, size, _decode_rate(records))
    raise UserError(
        f"--budget: even at {SIDES[-1]} pixels {count:,} images come to {size / 1e9:.2f} GB"
    )


def _records(files: Sequence[bytes], storage: Storage, workers: int) -> list[Record]:
    """What is stored of each file; bad ones are left out."""

    def record(data: bytes) -> Record | None:
        try:
            return make_record(data, storage)
        except BadImage:
            return None

    return [record for record in ordered_map(record, files, workers) if record]


def _scaled_size(record: Record, side: int | None) -> tuple[int, int]:
    scale = min(1.0, (side or np.inf) / max(record.height, record.width))
    return max(1, round(record.height * scale)), max(1, round(record.width * scale))


def _estimate(sizes: Sequence[int], count: int) -> int:
    """Bytes of a beton of `count` images, of which these are a sample."""
    mean = float(np.mean(sizes))
    error = float(np.std(sizes)) / len(sizes) ** 0.5 if count > len(sizes) else 0.0
    left_in_pages = 1 + mean / 2 / max(DEFAULT_PAGE_SIZE, mean)
    return round(count * ((mean + 2 * error) * left_in_pages + _ENTRY)) + 2 * DEFAULT_PAGE_SIZE


def _decode_rate(records: Sequence[Record]) -> float:
    """Images a second that one core turns from what is stored into pixels."""
    decoder = turbojpeg.Decoder(0)
    canvas = np.empty(max(record.height * record.width for record in records) * 3, np.uint8)
    start = time.perf_counter()
    for record in records:
        if isinstance(record.data, bytes):
            turbojpeg.decompress(
                decoder.handle, record.data, len(record.data), canvas.ctypes.data,
                record.width, 0, record.height, turbojpeg.RGB, turbojpeg.ACCURATE_DCT,
            )  # fmt: skip
        else:
            canvas[: record.data.size] = record.data.reshape(-1)
    return len(records) / (time.perf_counter() - start)
