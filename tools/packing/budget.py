"""Choosing the storage that fits a disk or a memory, from a sample of the images."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline import turbojpeg
from pipeline.beton_writer import DEFAULT_PAGE
from pipeline.errors import UserError
from pipeline.parallel import ordered_map
from tools.packing.images import Packed, Storage, pack_image
from tools.packing.jpeg import BadImage

SAMPLE = 256
SIDES = (None, 2048, 1536, 1280, 1024, 896, 768, 640, 512, 448, 384, 320, 256, 224, 192, 160, 128)
_ENTRY = 80  # bytes of an image in the tables, rounded up


class Choice(NamedTuple):
    """A storage, with its estimated size and speed."""

    storage: Storage
    bytes: int
    """Of the beton: the estimate plus twice its standard error."""
    images_per_s: float
    """Decoding rate of one core, measured on the sample."""


def choose(files: Sequence[bytes], count: int, budget: int, base: Storage, workers: int) -> Choice:
    """The storage with the largest side with which `count` images fit `budget` bytes: as pixels if
    these fit, else as JPEG.

    Args:
        files: a sample of the image files' bytes.

    Raises:
        UserError: if not even the smallest side fits.
    """
    originals = _records(files, replace(base, store="original"), workers)
    if not originals:
        raise UserError("--store auto: no image of the sample can be read")
    for side in SIDES:
        raw = [3 * math.prod(_scaled_size(record, side)) for record in originals]
        if (size := _estimate(raw, count)) <= budget:
            storage = replace(base, store="raw", max_side=side)
            return Choice(storage, size, _decode_rate(_records(files[:64], storage, 1)))
        storage = replace(base, store="jpeg" if side else "original", max_side=side)
        records = _records(files, storage, workers) if side else originals
        stored = [record.size for record in records]
        if (size := _estimate(stored, count)) <= budget:
            return Choice(storage, size, _decode_rate(records))
    raise UserError(
        f"--budget: {count:,} images of {SIDES[-1]} pixels still take {size / 1e9:.2f} GB"
    )


def _records(files: Sequence[bytes], storage: Storage, workers: int) -> list[Packed]:
    """The stored form of each good file."""

    def record(data: bytes) -> Packed | None:
        try:
            return pack_image(data, storage)
        except BadImage:
            return None

    return [record for record in ordered_map(record, files, workers) if record]


def _scaled_size(record: Packed, side: int | None) -> tuple[int, int]:
    scale = min(1.0, (side or np.inf) / max(record.height, record.width))
    return max(1, round(record.height * scale)), max(1, round(record.width * scale))


def _estimate(sizes: Sequence[int], count: int) -> int:
    """Bytes of a beton of `count` images, from a sample of their sizes."""
    mean = float(np.mean(sizes))
    error = float(np.std(sizes)) / len(sizes) ** 0.5 if count > len(sizes) else 0.0
    page_waste = 1 + mean / 2 / max(DEFAULT_PAGE, mean)
    return round(count * ((mean + 2 * error) * page_waste + _ENTRY)) + 2 * DEFAULT_PAGE


def _decode_rate(records: Sequence[Packed]) -> float:
    """Records per second that one core decodes to pixels."""
    decoder = turbojpeg.Decoder(0)
    canvas = np.empty(max(record.height * record.width for record in records) * 3, np.uint8)
    start = time.perf_counter()
    for record in records:
        if isinstance(record.data, bytes):
            shape = (record.height, record.width, 3)
            decoder.decompress(record.data, canvas[: math.prod(shape)].reshape(shape))
        else:
            canvas[: record.data.size] = record.data.reshape(-1)
    return len(records) / (time.perf_counter() - start)
