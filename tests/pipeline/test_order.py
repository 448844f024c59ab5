"""The order of the images in an epoch, and their partition into ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.beton import BLOCK
from pipeline.choices import ORDERS
from pipeline.errors import UserError
from pipeline.order import block_order, epoch_shares
from pipeline.source import ReadAhead


class Table:
    """The part of a beton that the order uses: the location of each image."""

    path = Path("some.beton")

    def __init__(self, images: int, bytes_each: int, first_block: int = 1) -> None:
        a_block = BLOCK // bytes_each
        number = np.arange(images)
        self.records = np.zeros((images, 5), np.int64)
        self.records[:, 0] = (
            first_block + number // a_block
        ) * BLOCK + number % a_block * bytes_each

    def __len__(self) -> int:
        return len(self.records)


def shares(table: Table, order: str = "quasi-random", epoch: int = 0, **options: Any) -> np.ndarray:
    values = {"batch_size": 8, "seed": 0, "window_bytes": 3 * BLOCK} | options
    return epoch_shares(table, epoch=epoch, order=order, **values)  # type: ignore[arg-type]


@given(
    images=st.integers(8, 200),
    order=st.sampled_from(ORDERS),
    bytes_each=st.sampled_from([BLOCK // 2, BLOCK // 7, BLOCK // 50]),
    window=st.integers(1, 20 * BLOCK),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
)
def test_a_step_is_shared_out_and_stays_the_same_step(
    images: int,
    order: str,
    bytes_each: int,
    window: int,
    seed: int,
    epoch: int,
    world: int,
    accumulation: int,
) -> None:
    """Breaks if ranks repeat or miss images, if ranks have different numbers of steps (some would
    then hang), or if the images of a step depend on the world size.
    """
    table = Table(images, bytes_each)
    same = {"seed": seed, "window_bytes": window}
    alone = shares(table, order, epoch, **same)
    parts = [
        shares(table, order, epoch, rank=rank, world=world, accumulation=accumulation, **same)
        for rank in range(world)
    ]
    steps = images // 8
    assert {part.shape for part in parts} == {(steps * accumulation, 8 // world // accumulation)}
    together = np.concatenate([part.reshape(steps, -1) for part in parts], axis=1)
    assert np.array_equal(np.sort(together), np.sort(alone))
    assert len(np.unique(together)) == steps * 8 and together.max() < images


def test_random_order_is_that_of_earlier_versions() -> None:
    """A run that was started with an earlier version must continue with the same images."""
    table = Table(9, 99)  # the numbers come from the loader before it had other orders
    assert shares(table, "random", 1, seed=3).tolist() == [[8, 0, 4, 1, 7, 2, 5, 3]]
    assert shares(table, "random", 77, seed=2**32 - 1).tolist() == [[4, 6, 5, 7, 1, 0, 2, 8]]


@given(window_blocks=st.integers(1, 12), epoch=st.integers(0, 99))
def test_quasi_random_stays_within_a_window(window_blocks: int, epoch: int) -> None:
    """For a set larger than memory: an image outside the window would cost a whole block."""
    table = Table(1000, BLOCK // 20)  # 50 blocks
    blocks, windows = block_order(table, 0, epoch, window_blocks * BLOCK)  # type: ignore[arg-type]
    assert sorted(blocks) == list(range(1, 51))
    window_of = np.arange(50) * windows // 50
    assert np.bincount(window_of).max() <= window_blocks
    order = shares(table, epoch=epoch, window_bytes=window_blocks * BLOCK).reshape(-1)
    position_of = np.empty(51, np.int64)
    position_of[blocks] = np.arange(50)
    window = window_of[position_of[table.records[order, 0] // BLOCK]]
    assert np.all(np.diff(window) >= 0) and window[-1] == windows - 1


@pytest.mark.parametrize("order", ORDERS)
def test_no_image_is_dropped_in_every_epoch(order: str) -> None:
    """1000 images make 10 steps of 99; the ten that are dropped must differ between epochs."""
    table = Table(1000, BLOCK // 20)
    epochs = [np.unique(shares(table, order, epoch, batch_size=99)) for epoch in range(4)]
    assert {len(images) for images in epochs} == {990}
    assert len(np.unique(np.concatenate(epochs))) == 1000


def test_sequential_follows_the_file() -> None:
    """Even if the records' numbers have another order than their locations, as with ffcv's
    writer."""
    table = Table(40, BLOCK // 7)
    table.records = table.records[::-1].copy()
    assert shares(table, "sequential").reshape(-1).tolist() == list(range(39, -1, -1))


def test_no_clumps_of_a_class() -> None:
    """ImageNet in a beton: 1000 classes in sequence, 1280 images of 110 kB in each, windows of
    4 GB. The number of pairs of one class within a step of 512 is 1.2 times that of random order.
    The images of a block are of one class, so the excess is the ratio of a block's images to the
    images of a class in a window. (With the format's pages of 8 MiB as blocks it was 3.)
    """
    table = Table(1_280_000, 110_000)
    label = np.arange(1_280_000) // 1280

    def pairs(order: str) -> float:
        steps = label[shares(table, order, batch_size=512, window_bytes=4_000_000_000)][::10]
        counts = np.stack([np.bincount(step, minlength=1000) for step in steps])
        return float((counts * (counts - 1)).sum())

    assert 1.1 < pairs("quasi-random") / pairs("random") < 1.3


def test_blocks_are_requested_one_window_ahead() -> None:
    """Each block is requested once, in order, before it is needed, and not with the whole file. An
    epoch that starts in the middle requests blocks from its first window on.
    """
    requested: list[int] = []
    ahead = ReadAhead(SimpleNamespace(advise=requested.extend))  # type: ignore[arg-type]
    blocks = np.random.default_rng(0).permutation(50)

    def begin(share: float) -> None:
        ahead.begin(blocks, 5, share)
        ahead._pool.submit(int).result()  # wait for the requests so far

    begin(0)
    assert requested == blocks[:10].tolist()
    for step in range(101):
        ahead.reach(step / 100)
        ahead._pool.submit(int).result()
        assert requested == blocks[: len(requested)].tolist()
        assert min(50, step / 2 + 10) <= len(requested) <= step / 2 + 11
    requested.clear()
    begin(0.5)
    assert requested == blocks[20:35].tolist()


def test_impossible_steps_are_refused() -> None:
    with pytest.raises(UserError, match="7 images are fewer than one batch of 8"):
        shares(Table(7, 99))
    with pytest.raises(UserError, match="8 images cannot be shared equally by 3 processes"):
        shares(Table(9, 99), world=3)
