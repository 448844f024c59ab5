"""The loader: each image once, the same views for any number of workers, and no failure hangs."""

import gc
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.decode
import pipeline.views
from pipeline.beton import Beton, CorruptRecord
from pipeline.decode import CanvasLoader, CropLoader
from pipeline.errors import UserError
from pipeline.loader import ViewLoader
from pipeline.source import Replacements, draw
from pipeline.views import ViewConfig
from tests.helpers.betons import photograph, varied, write_beton
from tests.helpers.manifests import damage, write_manifest

IMAGES = 26

WAYS: dict[str, dict[str, str]] = {
    "canvases": {"crops": "device"},
    "crops": {"crops": "host"},
    "views": {"crops": "host", "backend": "compiled"},
}
"""What the decoding threads write."""
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return Beton(write_beton(tmp_path_factory.mktemp("loader") / "photos.beton", varied(IMAGES)))


def view_loader(beton: Beton, batch_size: int = 8, **options) -> ViewLoader:
    defaults = {"seed": 3, "backend": "kornia", "device": torch.device("cpu"), "threads": 2}
    views = options.pop("views", None) or ViewConfig(size=options.pop("size", 16))
    return ViewLoader(beton, views, batch_size, **(defaults | options))


def test_canvases_hold_the_requested_images(beton: Beton) -> None:
    """Breaks if threads mix up positions, or a canvas is reused while it is read."""
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
    """Breaks if two ranks share images, or if the world size changes the images of a step."""
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


@ways
def test_views_do_not_depend_on_threads_world_or_accumulation(beton: Beton, way: dict) -> None:
    """Seam 1: an image's views follow from (seed, epoch, image) alone."""
    expected = views_by_image(view_loader(beton, **way))
    for options in ({"threads": 1}, {"threads": 5, "batch_size": 4}, {"accumulation": 4}):
        found = views_by_image(view_loader(beton, **way, **options))
        assert_same({i: found[i] for i in expected}, expected)
    halves = [views_by_image(view_loader(beton, **way, rank=rank, world=2)) for rank in range(2)]
    assert_same(halves[0] | halves[1], expected)


def masks_by_image(loader: ViewLoader, start: int = 0) -> dict[int, torch.Tensor]:
    found = {}
    for batch in loader.epoch(5, start):
        assert batch.masks is not None and batch.masks.dtype == torch.bool
        found |= dict(zip(batch.index.tolist(), batch.masks.unbind(1), strict=True))
    return found


@ways
def test_masks_come_with_their_images(beton: Beton, way: dict) -> None:
    """Without it an image's masks would depend on the backend, the place of the crops, threads,
    batch size, processes or the point of a resume, or belong to another image.
    """
    views = ViewConfig(size=64, mask_ratio=0.4, mask_ratio_spread=0.1)
    options = {**way, "views": views}
    whole = view_loader(beton, **options)
    params = draw(beton, 3, 5, np.arange(IMAGES), views)
    assert params.masks is not None
    expected = dict(
        zip(beton.index.tolist(), torch.from_numpy(params.masks).unbind(1), strict=True)
    )
    found = masks_by_image(whole)
    assert_same(found, {i: expected[i] for i in found})
    for changed in ({"threads": 1}, {"threads": 5, "batch_size": 4}, {"accumulation": 4}):
        others = masks_by_image(view_loader(beton, **options, **changed))
        assert_same(others, {i: expected[i] for i in others})
    halves = [masks_by_image(view_loader(beton, **options, rank=rank, world=2)) for rank in (0, 1)]
    assert_same(halves[0] | halves[1], found)
    tail = masks_by_image(whole, start=2)
    assert len(tail) == 8 and tail.keys() <= found.keys()
    assert_same(tail, {i: expected[i] for i in tail})
    plain = next(view_loader(beton, **way, size=64).epoch(5))
    masked = next(whole.epoch(5))
    assert plain.masks is None and torch.equal(plain.views, masked.views)


def test_masks_are_drawn_once_a_batch(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the decoding threads, which draw the crops too, would draw masks for nothing."""
    calls: list[int] = []
    sample = pipeline.views.sample_masks

    def counting(*arguments) -> None:
        calls.append(len(arguments[2]))
        sample(*arguments)

    monkeypatch.setattr(pipeline.views, "sample_masks", counting)
    views = ViewConfig(size=64, mask_ratio=0.4)
    list(view_loader(beton, crops="host", backend="compiled", views=views).epoch(0))
    assert calls == [8] * 3


@ways
def test_start_in_mid_epoch_is_the_tail_of_the_epoch(beton: Beton, way: dict) -> None:
    """A resumed run must see exactly the views of an uninterrupted run."""
    loader = view_loader(beton, accumulation=2, **way)
    whole = list(loader.epoch(5))
    tail = list(loader.epoch(5, start=2))
    assert len(tail) == 2 and len(whole) == 6
    for one, other in zip(whole[4:], tail, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.overlap, other.overlap)


@ways
def test_start_in_mid_epoch_decodes_nothing_that_it_skips(
    beton: Beton, way: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume late in an epoch of ImageNet must not read a hundred gigabytes first."""
    loader = view_loader(beton, **way)
    decoded: list[int] = []
    try_decode = Beton.try_decode

    def counting(self: Beton, which: np.ndarray, *rest) -> tuple[int, str]:
        decoded.extend(which.tolist())
        return try_decode(self, which, *rest)

    monkeypatch.setattr(Beton, "try_decode", counting)
    list(loader.epoch(5, start=2))
    assert sorted(decoded) == sorted(loader.shares(5)[2:].reshape(-1))


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_crops_of_the_host_are_those_of_the_device(beton: Beton, backend: str) -> None:
    """The setting changes only speed: backends with PIL's crops give the same views bit for bit."""
    one, other = (
        views_by_image(view_loader(beton, crops=crops, backend=backend, size=40))
        for crops in ("host", "device")
    )
    assert_same(one, other)


def test_large_photographs_are_decoded_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong box would show as a shift, at 20 to 30 dB. Too small a scale would show in the last
    two images, whose lines are 5 pixels apart, at 30 dB."""
    noise = np.random.default_rng(0).normal(0, 8, (2, 400, 500, 3))
    images = [(photograph(i, 400, 500) + noise[i]).clip(0, 255).astype(np.uint8) for i in range(2)]
    lines = np.broadcast_to(np.arange(500)[:, None] % 5 < 2, (400, 500, 3)).astype(np.uint8) * 200
    images += [lines, np.ascontiguousarray(np.rot90(lines))]
    beton = Beton(write_beton(tmp_path / "large.beton", images))
    views = ViewConfig(size=16, min_scale=0.3)
    loader = CropLoader(beton, 1, False, views=views, seed=0, views_of=lambda epoch: views)
    scale, scales = pipeline.decode._scale, []

    def spy(boxes: np.ndarray, side: int) -> int:
        scales.append(scale(boxes, side))
        return scales[-1]

    monkeypatch.setattr(pipeline.decode, "_scale", spy)
    small = next(pixels.float().clone() for _, pixels in loader.decode([np.arange(4)]))
    monkeypatch.setattr(pipeline.decode, "_scale", lambda *_: 1)
    whole = next(pixels.float().clone() for _, pixels in loader.decode([np.arange(4)]))
    assert set(scales) <= {2, 4} and not torch.equal(small, whole)
    error = (small - whole).square().mean(dim=(2, 3, 4))
    assert float(error.max()) < 255**2 / 10**4.4  # 44 dB


@ways
def test_views_follow_the_epoch(beton: Beton, way: dict) -> None:
    """A progressive size changes only the views' pixels: not the images, not the geometry. A
    progressive scale changes the crops, and with them the geometry.
    """
    scaled = [ViewConfig(size=16, max_scale=scale) for scale in (0.2, 1.0)]
    growing = view_loader(beton, **way, size=16, views_of=lambda epoch: scaled[epoch])
    for epoch in (0, 1):
        fixed = view_loader(beton, **way, views=scaled[epoch])
        for one, other in zip(growing.epoch(epoch), fixed.epoch(epoch), strict=True):
            assert torch.equal(one.views, other.views) and torch.equal(one.overlap, other.overlap)
    sizes = [ViewConfig(size=side) for side in (16, 32)]
    growing = view_loader(beton, **way, size=32, views_of=lambda epoch: sizes[epoch])
    for epoch, side in ((0, 16), (1, 32), (0, 16)):
        fixed = view_loader(beton, **way, size=side)
        for one, other in zip(growing.epoch(epoch), fixed.epoch(epoch), strict=True):
            assert torch.equal(one.views, other.views) and one.views.shape[-1] == side
            assert torch.equal(one.overlap, other.overlap)


def test_batch_has_the_shapes_of_seam_3(beton: Beton) -> None:
    batch = next(view_loader(beton, dtype=torch.bfloat16).epoch(0))
    assert batch.views.shape == (2, 8, 3, 16, 16) and batch.views.dtype == torch.bfloat16
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert batch.overlap.shape == (2, 8, 4) and batch.overlap.dtype == torch.float32
    assert batch.flipped.shape == (2, 8) and batch.flipped.dtype == torch.bool
    assert batch.index.shape == (8,) and batch.index.dtype == torch.int64


def test_corrupt_record_is_raised_and_the_loader_stays_usable(tmp_path: Path) -> None:
    """An error in a thread must reach the caller; FFCV's loader hangs here."""
    path = write_beton(tmp_path / "bad.beton", varied(8))
    beton = Beton(path)
    damage(path, beton.records[6, 0], b"\0" * 20)
    loader = CanvasLoader(beton, threads=2, pin=False)
    with pytest.raises(CorruptRecord, match="record 6"):
        list(loader.decode([np.arange(0, 4), np.arange(4, 8)]))
    assert len(list(loader.decode([np.arange(0, 6)]))) == 1


@ways
def test_error_of_a_thread_surfaces_at_its_batch(
    beton: Beton, way: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for unexpected errors too. The batches before it are intact, and the loader can be
    used again.
    """
    loader = view_loader(beton, **way)
    victim = loader.shares(0)[1, 3]
    try_decode = Beton.try_decode

    def failing(self: Beton, which: np.ndarray, *rest) -> tuple[int, str]:
        if victim in which:
            raise ZeroDivisionError("in a thread")
        return try_decode(self, which, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Beton, "try_decode", failing)
        batches = loader.epoch(0)
        next(batches)
        with pytest.raises(ZeroDivisionError, match="in a thread"):
            next(batches)
    assert len(list(loader.epoch(0))) == 3


@ways
def test_file_cut_short_under_a_running_loader(tmp_path: Path, way: dict) -> None:
    """A memory map would end the process with SIGBUS here."""
    path = write_beton(tmp_path / "cut.beton", varied(IMAGES))
    loader = view_loader(Beton(path), batch_size=4, **way)
    batches = loader.epoch(0)
    next(batches)
    os.truncate(path, int(loader.beton.records[:, 0].min()))
    with pytest.raises(UserError, match=r"cut\.beton: the file was written to while it was in use"):
        list(batches)


def test_file_removed_under_a_running_loader(tmp_path: Path) -> None:
    """An open file stays readable: a new packing must not end a running training."""
    path = write_beton(tmp_path / "gone.beton", varied(IMAGES))
    loader = view_loader(Beton(path))
    path.unlink()
    assert len(list(loader.epoch(0))) == 3


@pytest.fixture
def spoilt(tmp_path: Path) -> Beton:
    """26 images. Images 4, 5, 6 and the last cannot be decoded. Image 7, which replaces the first
    three, is larger than its neighbours.
    """
    images = varied(IMAGES)
    images[7] = photograph(7, 90, 110)
    path = write_beton(tmp_path / "spoilt.beton", images)
    beton = Beton(path)
    for i in (4, 5, 6, IMAGES - 1):
        damage(path, int(beton.records[i, 0]), bytes(20))
    write_manifest(path)
    return beton


def test_corrupt_image_is_replaced_by_the_next(
    spoilt: Beton, capfd: pytest.CaptureFixture[str]
) -> None:
    """The batch must name the image on the canvas, because index and views follow from it. The
    replacement is the next image; after the last image comes the first.
    """
    loader = CanvasLoader(spoilt, threads=3, pin=False, on_corrupt="replace")
    batches = [np.array([0, 1, 2, 3]), np.array([3, 4, 6, 8]), np.array([25, 5]), np.array([6])]
    expected = [[0, 1, 2, 3], [3, 7, 7, 8], [0, 7], [7]]
    for _ in range(2):
        for numbers, (which, canvas) in zip(expected, loader.decode(batches), strict=True):
            assert which.tolist() == numbers
            for i, pixels in zip(which, canvas.numpy(), strict=True):
                image = spoilt.decode(i)
                assert np.array_equal(pixels[: image.shape[0], : image.shape[1]], image)
    assert loader.replacements.known == {4: 7, 5: 7, 6: 7, 25: 0}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4  # one line per bad image, although each was decoded often
    assert "photos/4.jpg: not a JPEG" in lines[0]
    assert lines[0].endswith("; photos/7.jpg replaces it")


@ways
def test_replacement_does_not_depend_on_threads_or_world(spoilt: Beton, way: dict) -> None:
    """Otherwise ranks and resumed runs would train on different sets."""

    def replacing(**options) -> ViewLoader:
        replacing = {
            "on_corrupt": "replace",
            "max_replaced": 0.2,
            "size": 32,
            "backend": "compiled",
        }
        return view_loader(spoilt, **replacing | way | options)

    loader = replacing(crops="device", backend="compiled", threads=1)
    expected = views_by_image(loader)
    assert len(loader.replaced) == 4
    assert 4 not in expected and 7 in expected
    for options in ({"threads": 4}, {"accumulation": 4}):
        assert_same(views_by_image(replacing(**options)), expected)
    ranks = [replacing(rank=rank, world=2) for rank in range(2)]
    assert len(list(ranks[0].epoch(2))) == len(list(ranks[1].epoch(2)))
    halves = [views_by_image(loader) for loader in ranks]
    assert_same(halves[0] | halves[1], expected)


def test_replaced_image_is_the_one_in_the_batch(spoilt: Beton) -> None:
    """Index, overlap and pixels of a row must belong to the same image."""
    whole = view_loader(spoilt, on_corrupt="replace", max_replaced=0.2, batch_size=IMAGES)
    batch = next(whole.epoch(1))
    rows = [row for row, i in enumerate(batch.index.tolist()) if i == 7]
    assert len(rows) == 4  # 4, 5, 6 and itself
    for row in rows[1:]:
        assert torch.equal(batch.views[:, row], batch.views[:, rows[0]])
        assert torch.equal(batch.overlap[:, row], batch.overlap[:, rows[0]])


def test_stop_is_the_default_and_names_the_image(spoilt: Beton) -> None:
    with pytest.raises(CorruptRecord, match=r"photos/(4|5|6|25)\.jpg: not a JPEG"):
        list(view_loader(spoilt).epoch(0))


def test_beton_of_which_nothing_decodes_is_an_error(tmp_path: Path) -> None:
    """Breaks if the search for a replacement never ends."""
    path = write_beton(tmp_path / "ruin.beton", varied(5))
    beton = Beton(path)
    for pointer in beton.records[:, 0].tolist():
        damage(path, pointer, bytes(20))
    loader = CanvasLoader(beton, threads=2, pin=False, on_corrupt="replace")
    with pytest.raises(CorruptRecord, match="no record can be decoded"):
        list(loader.decode([np.arange(5)]))


@ways
def test_too_many_replacements_end_the_run(spoilt: Beton, way: dict) -> None:
    """Without it a beton that was overwritten trains on what is left of it. By default 5 % may be
    bad; the line names count, share, the first file and its reason, and the setting.
    """
    message = r"at least [23] of \d+ images.* are bad \(\d+\.\d%; data.max_replaced: 0\.05\)"
    with pytest.raises(UserError, match=message + r"; the first one is photos/\d+\.jpg: not a"):
        list(view_loader(spoilt, **way, on_corrupt="replace").epoch(0))
    enough = view_loader(spoilt, **way, on_corrupt="replace", max_replaced=0.16)
    assert len(list(enough.epoch(0))) == 3


def test_share_of_replacements_counts_the_images_that_were_read(
    beton: Beton, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without it one bad image among the first ends a run, or a rank, which reads a small part of
    the set, needs many epochs to notice that a fifth is bad.
    """
    monkeypatch.setattr("pipeline.source._FIRST", 10)
    few = Replacements(beton, 0.1)
    few.apply(np.arange(4))
    few.find(3, "spoilt")  # one of the first ten
    few.apply(np.arange(4, 8))
    with pytest.raises(CorruptRecord, match=r"2 of 8 images read so far are bad \(25\.0%"):
        few.find(7, "spoilt")
    many = Replacements(beton, 0.1)
    for begin in range(0, 20, 4):
        many.apply(np.arange(begin, begin + 4))
    many.find(3, "spoilt")
    many.find(7, "spoilt")
    assert many.known == {3: 4, 7: 8}
    assert many.apply(np.array([3, 4])).tolist() == [4, 4]


@ways
def test_overwritten_file_ends_the_run_at_the_next_epoch(tmp_path: Path, way: dict) -> None:
    """Without it the rest of the run trains on whatever lies at the old places. The epoch in which
    it happens does not end well either.
    """
    path = write_beton(tmp_path / "photos.beton", varied(IMAGES))
    content = path.read_bytes()
    opened = Beton(path)
    loader = view_loader(opened, **way)
    batches = loader.epoch(0)
    next(batches)
    path.write_bytes(content[: len(content) // 2])  # while threads still read
    path.write_bytes(content)
    written = r"photos\.beton: the file was written to while it was in use"
    for begun in (batches, loader.epoch(1)):
        with pytest.raises(UserError, match=written):
            list(begun)
    with pytest.raises(UserError, match=written):
        view_loader(opened)
    assert len(list(view_loader(Beton(path)).epoch(0))) == 3


def test_loader_compares_each_record_with_the_manifest(tmp_path: Path) -> None:
    """Without it a raw image that was replaced is trained on, or reported only by --verify."""
    path = write_beton(tmp_path / "raw.beton", varied(IMAGES), mode="raw")
    write_manifest(path)
    damage(path, int(Beton(path).records[9, 0]) + 5, bytes(3))
    with pytest.raises(CorruptRecord, match=r"photos/9\.jpg: its bytes are not those that"):
        list(view_loader(Beton(path), batch_size=IMAGES).epoch(0))


@pytest.mark.parametrize(
    "options", [WAYS["canvases"], WAYS["crops"] | {"order": "quasi-random"}, WAYS["views"]]
)
def test_200_epochs_leave_nothing_behind(beton: Beton, options: dict) -> None:
    """Breaks if an epoch starts threads, opens files, keeps memory, or continues to decode after a
    break. The views have no colour operations, which would take most of the time.
    """
    gc.collect()  # the loaders of other tests
    plain = ViewConfig(size=16, jitter=0, grey=0, blur=(0, 0), solarize=(0, 0))
    loader = view_loader(beton, views=plain, **options)

    def run(epochs: range) -> None:
        for epoch in epochs:
            for step, _ in enumerate(loader.epoch(epoch)):
                if step == epoch % 3:
                    break

    run(range(20))
    threads, memory = set(threading.enumerate()), psutil.Process().memory_info().rss
    files = set(Path("/proc/self/fd").iterdir())
    run(range(20, 200))
    assert set(threading.enumerate()) <= threads
    assert set(Path("/proc/self/fd").iterdir()) <= files
    assert psutil.Process().memory_info().rss - memory < 16e6
    assert len(list(loader.epoch(0))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "26 images are fewer than one batch of 27"),
        ({"batch_size": 0}, "needs at least one"),
        ({"batch_size": 9, "world": 2}, "cannot be shared equally by 2 processes"),
        ({"batch_size": 8, "accumulation": 3}, "x 3 micro-batches"),
        ({"backend": "opencv"}, "opencv"),
    ],
)
def test_impossible_settings_are_refused(beton: Beton, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        view_loader(beton, **options)


@pytest.mark.parametrize("start", [-1, 4])
def test_a_step_that_the_epoch_lacks_is_refused(beton: Beton, start: int) -> None:
    """-1 would give the end of the epoch, as in Python's slices."""
    with pytest.raises(ValueError, match="start must be a step of the epoch"):
        next(view_loader(beton).epoch(0, start))


def views_by_image(loader: ViewLoader) -> dict[int, torch.Tensor]:
    batches = list(loader.epoch(2))
    return {int(i): batch.views[:, b] for batch in batches for b, i in enumerate(batch.index)}


def assert_same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for i, views in one.items():
        assert torch.equal(views, other[i])
