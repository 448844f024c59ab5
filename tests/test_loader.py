"""The loader: every image once, the same views whoever shares the work, and no failure hangs."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.beton import Beton, CorruptRecord
from pipeline.errors import UserError
from pipeline.loader import CanvasLoader, ViewLoader
from pipeline.views import ViewConfig
from tests.betons import varied, write_beton

IMAGES = 26


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return Beton(write_beton(tmp_path_factory.mktemp("loader") / "photos.beton", varied(IMAGES)))


def view_loader(beton: Beton, batch_size: int = 8, **options) -> ViewLoader:
    defaults = {"seed": 3, "backend": "kornia", "device": torch.device("cpu"), "threads": 2}
    return ViewLoader(beton, ViewConfig(size=16), batch_size, **(defaults | options))


def test_canvases_hold_the_images_asked_for(beton: Beton) -> None:
    """Breaks if threads mix up slots, or a canvas is reused while it is being read."""
    loader = CanvasLoader(beton, threads=3, pin=False)
    generator = np.random.default_rng(0)
    batches = [generator.permutation(IMAGES)[:7] for _ in range(9)]
    for expected, (which, canvas) in zip(batches, loader.decode(batches), strict=True):
        assert np.array_equal(which, expected)
        for i, pixels in zip(which, canvas.numpy(), strict=True):
            height, width = beton.height[i], beton.width[i]
            assert np.array_equal(pixels[:height, :width], beton.decode(i))


@settings(max_examples=25, deadline=None)
@given(
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_ranks_share_each_step_without_overlap(
    beton: Beton, world: int, accumulation: int, seed: int, epoch: int
) -> None:
    """Breaks if a rank repeats another's images, or if the world size changes what a step holds."""
    alone = view_loader(beton, seed=seed).shares(epoch)
    shares = [
        view_loader(beton, seed=seed, rank=rank, world=world, accumulation=accumulation).shares(
            epoch
        )
        for rank in range(world)
    ]
    steps = [share.reshape(IMAGES // 8, -1) for share in shares]
    together = np.concatenate(steps, axis=1)
    assert np.array_equal(np.sort(together), np.sort(alone))
    assert len(np.unique(together)) == together.size


def test_epochs_and_seeds_shuffle_differently(beton: Beton) -> None:
    orders = [view_loader(beton, seed=seed).shares(epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert not np.array_equal(one, other)


def test_views_do_not_depend_on_threads_world_or_accumulation(beton: Beton) -> None:
    """Seam 1: an image's views follow from (seed, epoch, image), not from who makes them."""
    expected = views_by_image(view_loader(beton))
    for options in ({"threads": 1}, {"accumulation": 4}):
        assert_same(views_by_image(view_loader(beton, **options)), expected)
    halves = [views_by_image(view_loader(beton, rank=rank, world=2)) for rank in range(2)]
    assert_same(halves[0] | halves[1], expected)


def test_start_in_mid_epoch_is_the_tail_of_the_epoch(beton: Beton) -> None:
    """A resumed run sees exactly the views that it would have seen."""
    loader = view_loader(beton, accumulation=2)
    whole = list(loader.epoch(5))
    tail = list(loader.epoch(5, start=2))
    assert len(tail) == 2 and len(whole) == 6
    for one, other in zip(whole[4:], tail, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.overlap, other.overlap)


def test_batch_has_the_shapes_of_seam_3(beton: Beton) -> None:
    batch = next(view_loader(beton, dtype=torch.bfloat16).epoch(0))
    assert batch.views.shape == (2, 8, 3, 16, 16) and batch.views.dtype == torch.bfloat16
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert batch.overlap.shape == (2, 8, 4) and batch.overlap.dtype == torch.float32
    assert batch.flipped.shape == (2, 8) and batch.flipped.dtype == torch.bool
    assert batch.index.shape == (8,) and batch.index.dtype == torch.int64


def test_corrupt_record_surfaces_and_the_loader_lives_on(tmp_path: Path) -> None:
    """An error in a thread must reach the caller; FFCV's own loader hangs here."""
    path = write_beton(tmp_path / "bad.beton", varied(8))
    beton = Beton(path)
    with path.open("r+b") as file:
        file.seek(beton.records[6, 0])
        file.write(b"\0" * 20)
    loader = CanvasLoader(beton, threads=2, pin=False)
    with pytest.raises(CorruptRecord, match="record 6"):
        list(loader.decode([np.arange(0, 4), np.arange(4, 8)]))
    assert len(list(loader.decode([np.arange(0, 6)]))) == 1


def test_early_end_and_many_epochs_leave_nothing_behind(beton: Beton) -> None:
    """Breaks if an epoch starts threads, opens files, or goes on decoding after a break."""
    loader = view_loader(beton)
    next(loader.epoch(0))
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for epoch in range(40):
        for step, _ in enumerate(loader.epoch(epoch)):
            if step == epoch % 3:
                break
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "26 images are fewer than one batch of 27"),
        ({"batch_size": 9, "world": 2}, "cannot be shared equally by 2 processes"),
        ({"batch_size": 8, "accumulation": 3}, "x 3 micro-batches"),
        ({"backend": "opencv"}, "opencv"),
    ],
)
def test_impossible_settings_are_refused(beton: Beton, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        view_loader(beton, **options)


def views_by_image(loader: ViewLoader) -> dict[int, torch.Tensor]:
    batches = list(loader.epoch(2))
    return {int(i): batch.views[:, b] for batch in batches for b, i in enumerate(batch.index)}


def assert_same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for i, views in one.items():
        assert torch.equal(views, other[i])
