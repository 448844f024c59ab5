"""The order of the images in an epoch, and their partition into steps, micro-batches and ranks.

All of it follows from (seed, epoch) and the beton. The set is ordered and cut into steps first,
and each step is cut into micro-batches and ranks afterwards. So a step holds the same images for
any world size, and an epoch can start at any step.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.beton import BLOCK, Beton
from pipeline.choices import Order
from pipeline.errors import UserError


def steps_per_epoch(beton: Beton, batch_size: int, world: int, accumulation: int) -> int:
    """Whole steps of `batch_size` images. Raises UserError if there is none, or if a step cannot be
    divided equally.
    """
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images: it needs at least one")
    if batch_size % (world * accumulation):
        raise UserError(
            f"a batch of {batch_size} images cannot be shared equally by {world} processes"
            f" x {accumulation} micro-batches"
        )
    if batch_size > len(beton):
        raise UserError(
            f"{beton.path}: {len(beton)} images are fewer than one batch of {batch_size}"
        )
    return len(beton) // batch_size


def epoch_shares(
    beton: Beton,
    batch_size: int,
    seed: int,
    epoch: int,
    order: Order,
    window_bytes: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
) -> NDArray[np.int64]:
    """The records of `rank`: int64 [steps · accumulation, images of a micro-batch].

    The epoch drops the images after the last whole step. Over many epochs each image is dropped
    equally often.
    """
    steps = steps_per_epoch(beton, batch_size, world, accumulation)
    images = _ordered(beton, seed, epoch, order, window_bytes, steps * batch_size)
    return images.reshape(steps * accumulation, world, -1)[:, rank]


def block_order(
    beton: Beton, seed: int, epoch: int, window_bytes: int
) -> tuple[NDArray[np.int64], int]:
    """The file's blocks of BLOCK bytes (int64 [P], by number) in the order of a quasi-random epoch,
    and the number of windows.

    A window is a run of consecutive blocks, at most `window_bytes` long but at least one block.
    Windows have equal lengths, so that the last one does not give steps of only a few blocks.
    """
    blocks = np.unique(beton.records[:, 0] // BLOCK)
    generator = np.random.Generator(_philox(seed, epoch).jumped())  # independent of the images'
    return generator.permutation(blocks), -(-len(blocks) // max(1, window_bytes // BLOCK))


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers from 0 to `count` - 1 in the random order of `epoch`."""
    return np.random.Generator(_philox(seed, epoch)).permutation(count)


def _ordered(
    beton: Beton, seed: int, epoch: int, order: Order, window_bytes: int, count: int
) -> NDArray[np.int64]:
    """The first `count` images of an epoch."""
    if order == "sequential":  # starts where the previous epoch ended
        positions = (epoch * count % len(beton) + np.arange(count)) % len(beton)
        return np.argsort(beton.records[:, 0], kind="stable")[positions]
    images = permutation(len(beton), seed, epoch)
    if order == "quasi-random":
        blocks, windows = block_order(beton, seed, epoch, window_bytes)
        by_number = np.argsort(blocks)
        window = by_number * windows // len(blocks)  # of each block, in the order of the file
        block = np.searchsorted(blocks[by_number], beton.records[images, 0] // BLOCK)
        images = images[np.argsort(window[block], kind="stable")]
    return images[:count]


def _philox(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], np.uint64))
