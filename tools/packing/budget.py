"""Choosing the storage that fits a disk or a memory, from a sample of the images."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline import turbojpeg
from pipeline.beton_writer import DEFAULT_PAGE
from pipeline.errors import BadImage, UserError
from pipeline.images import LIMITS, Limits
from pipeline.parallel import ordered_map
from tools.packing.images import Storage, pack_image
from tools.packing.read import read_image
from tools.packing.sources import Source

SAMPLE = 256
SIDES = (None, 2048, 1536, 1280, 1024, 896, 768, 640, 512, 448, 384, 320, 256, 224, 192, 160, 128)
_TIMED = 64  # images
_ENTRY = 80  # bytes of an image in the tables, rounded up


class Choice(NamedTuple):
    """A storage, with its estimated size and speed."""

    storage: Storage
    bytes: int
    """Of the beton: the estimate plus twice its standard error."""
    images_per_s: float
    """Decoding rate of one core, measured on the sample."""
    images: int
    """That could be read, of the sample."""


class _Stored(NamedTuple):
    """What is kept of one image of the sample."""

    height: int
    width: int
    size: int
    """Stored bytes."""


def choose(
    source: Source, budget: int, base: Storage, workers: int, limits: Limits = LIMITS
) -> Choice:
    """The storage with the largest side with which the images fit `budget` bytes: as pixels if
    these fit, else as JPEG. One image a worker is in memory.

    Raises:
        UserError: if not even the smallest side fits.
    """
    count = len(source)
    sample = [i * count // SAMPLE for i in range(SAMPLE)] if count > SAMPLE else list(range(count))

    def stored(storage: Storage) -> dict[int, _Stored]:
        packed = ordered_map(lambda i: _pack(source, i, storage, limits), sample, workers)
        return {i: one for i, one in zip(sample, packed, strict=True) if one}

    def choice(storage: Storage, size: int) -> Choice:
        return Choice(storage, size, _decode_rate(source, good, storage, limits), len(good))

    originals = stored(replace(base, store="original"))
    good = list(originals)
    if not good:
        raise UserError("--store auto: no image of the sample can be read")
    for side in SIDES:
        raw = [3 * math.prod(_scaled_size(one, side)) for one in originals.values()]
        if (size := _estimate(raw, count)) <= budget:
            return choice(replace(base, store="raw", max_side=side), size)
        storage = replace(base, store="jpeg" if side else "original", max_side=side)
        sizes = [one.size for one in (stored(storage) if side else originals).values()]
        if (size := _estimate(sizes, count)) <= budget:
            return choice(storage, size)
    raise UserError(
        f"--budget: {count:,} images of {SIDES[-1]} pixels still take {size / 1e9:.2f} GB"
    )


def _pack(source: Source, i: int, storage: Storage, limits: Limits) -> _Stored | None:
    """The size of image `i` as it would be stored; None for a bad one."""
    try:
        packed = pack_image(read_image(source, i, limits), storage, limits)
    except BadImage:
        return None
    return _Stored(packed.height, packed.width, packed.size)


def _scaled_size(record: _Stored, side: int | None) -> tuple[int, int]:
    scale = min(1.0, (side or np.inf) / max(record.height, record.width))
    return max(1, round(record.height * scale)), max(1, round(record.width * scale))


def _estimate(sizes: Sequence[int], count: int) -> int:
    """Bytes of a beton of `count` images, from a sample of their sizes."""
    mean = float(np.mean(sizes))
    error = float(np.std(sizes)) / len(sizes) ** 0.5 if count > len(sizes) else 0.0
    page_waste = 1 + mean / 2 / max(DEFAULT_PAGE, mean)
    return round(count * ((mean + 2 * error) * page_waste + _ENTRY)) + 2 * DEFAULT_PAGE


def _decode_rate(source: Source, sample: list[int], storage: Storage, limits: Limits) -> float:
    """Images per second that one core decodes to pixels, measured on up to `_TIMED`."""
    decoder, seconds, images = turbojpeg.Decoder(0), 0.0, 0
    for i in sample[:_TIMED]:
        data, height, width, *_ = pack_image(read_image(source, i, limits), storage, limits)
        canvas = np.ones((height, width, 3), np.uint8)
        start = time.perf_counter()
        if isinstance(data, bytes):
            decoder.decompress(data, canvas)
        else:
            canvas[:] = data
        seconds += time.perf_counter() - start
        images += 1
    return images / seconds
