"""Which image comes when in an epoch, and which rank takes it.

All of it follows from (seed, epoch) and the beton. The set is put in order and cut into steps
first, into micro-batches and ranks after, so a step holds the same images however many processes
share it, and an epoch can be entered at any step.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.beton import BLOCK, Beton
from pipeline.choices import Order
from pipeline.errors import UserError


def steps_per_epoch(beton: Beton, batch_size: int, world: int, accumulation: int) -> int:
    """Whole steps of `batch_size` images. Raises UserError if there is none, or if a step cannot be
    shared out equally.
    """
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images: it needs one at least")
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
    """The records that `rank` takes: int64 [steps · accumulation, images of a micro-batch].

    What is left over after the last whole step is left out of the epoch; over the epochs that meets
    all images alike.
    """
    steps = steps_per_epoch(beton, batch_size, world, accumulation)
    images = _ordered(beton, seed, epoch, order, window_bytes, steps * batch_size)
    return images.reshape(steps * accumulation, world, -1)[:, rank]


def block_order(
    beton: Beton, seed: int, epoch: int, window_bytes: int
) -> tuple[NDArray[np.int64], int]:
    """The file's blocks of BLOCK bytes (int64 [P], by number) as a quasi-random epoch goes through
    them, and how many windows they are cut into.

    Consecutive ones make a window, which is at most `window_bytes` long, or one block. Windows are
    of equal length, so that the last one does not make steps of a few blocks.
    """
    blocks = np.unique(beton.records[:, 0] // BLOCK)
    own = np.random.Generator(_philox(seed, epoch).jumped())  # not the numbers of the images
    return own.permutation(blocks), -(-len(blocks) // max(1, window_bytes // BLOCK))


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers from 0 to `count` - 1 as `epoch` goes through them."""
    return np.random.Generator(_philox(seed, epoch)).permutation(count)


def _ordered(
    beton: Beton, seed: int, epoch: int, order: Order, window_bytes: int, count: int
) -> NDArray[np.int64]:
    """The first `count` images of an epoch."""
    if order == "sequential":  # goes on where the last epoch ended
        places = (epoch * count % len(beton) + np.arange(count)) % len(beton)
        return np.argsort(beton.records[:, 0], kind="stable")[places]
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
