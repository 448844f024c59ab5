"""DALI as a source of batches: equal to ViewLoader except for rounding, and no failure hangs."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.augment import IMAGENET_STD
from pipeline.beton import Beton, CorruptRecord
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.dali import DaliLoader
from pipeline.errors import UserError
from pipeline.loader import ViewLoader
from pipeline.source import Batch
from pipeline.views import ViewConfig
from tests.helpers.betons import photograph, varied, write_beton
from tests.helpers.jpegs import HEIGHT, WIDTH, pool
from tests.helpers.manifests import damage, write_manifest
from tests.tools.packing.test_build_dataset import run, save

IMAGES = 26
GEOMETRY = {"jitter": 0, "grey": 0, "blur": (0, 0), "solarize": (0, 0)}

needs_dali = pytest.mark.skipif(
    not (find_spec("nvidia") and find_spec("nvidia.dali")),
    reason="needs NVIDIA DALI: pip install slotstream[dali]",
)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], ids=str
)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return Beton(write_beton(tmp_path_factory.mktemp("dali") / "photos.beton", varied(IMAGES)))


@pytest.fixture(scope="module")
def detailed(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """Images with contrast at every scale, from much smaller to much larger than a view."""
    images = []
    for i, side in enumerate((20, 50, 90, 130, 200, 310, 400, 500)):
        image = photograph(i, side, side * 3 // 2).astype(np.int16)
        grid = np.indices(image.shape[:2]).sum(0)[:, :, None]
        image += (40 * np.sin(grid / 3) + 25 * (grid % 16 < 8)).astype(np.int16)
        images.append(image.clip(0, 255).astype(np.uint8))
    return Beton(write_beton(tmp_path_factory.mktemp("dali") / "detailed.beton", images))


def loaders(
    beton: Beton, batch_size: int = 8, views: ViewConfig | None = None, **options
) -> tuple[DaliLoader, ViewLoader]:
    """Both loaders with the same settings."""
    defaults = {"seed": 3, "backend": "kornia", "device": torch.device("cpu"), "threads": 2}
    arguments = (beton, views or ViewConfig(size=16), batch_size)
    return tuple(cls(*arguments, **(defaults | options)) for cls in (DaliLoader, ViewLoader))


def dali_loader(beton: Beton, **options) -> DaliLoader:
    return loaders(beton, **options)[0]


def levels_apart(one: Batch, other: Batch) -> torch.Tensor:
    """[2, B, 3, S, S]: the difference of the views in levels of 255."""
    scale = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    return (one.views.float().cpu() - other.views.float().cpu()).abs() * scale


def assert_alike(ours: Iterator[Batch], theirs: Iterator[Batch], mean_levels: float = 1) -> int:
    """Assert that pixels are almost equal and everything else is equal; return the number of
    batches.
    """
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        for name in ("index", "overlap", "flipped", "masks"):
            a, b = getattr(one, name), getattr(other, name)
            if a is None and b is None:  # without masks
                continue
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), name
        assert one.views.dtype == other.views.dtype and one.views.shape == other.views.shape
        assert one.views.stride() == other.views.stride()
        assert levels_apart(one, other).mean((2, 3, 4)).max() < 3 * mean_levels  # every image
        assert levels_apart(one, other).mean() < mean_levels
        count += 1
    return count


# ---- The same batches ----


@needs_dali
@devices
def test_crops_are_those_of_pil(detailed: Beton, device: str) -> None:
    """Breaks if a filter sees pixels outside its crop, is not antialiased, or has another shape or
    phase; if x and y, or the views, are swapped; if the flip comes before the crop.
    """
    views = ViewConfig(size=96, **GEOMETRY)
    options = {"views": views, "backend": "reference", "batch_size": 8}
    dali, _ = loaders(detailed, device=torch.device(device), **options)
    _, reference = loaders(detailed, **options)
    for epoch in range(3):
        for one, other in zip(dali.epoch(epoch), reference.epoch(epoch), strict=True):
            apart = levels_apart(one, other)
            assert apart.mean() < 1
            worst = apart.square().mean((2, 3, 4)).max().item()
            assert 20 * np.log10(255) - 10 * np.log10(worst) > 38


@needs_dali
@devices
@pytest.mark.parametrize("backend", ["reference", "kornia"])
def test_whole_recipe_is_the_references(detailed: Beton, backend: str, device: str) -> None:
    """Each backend applies its colours to DALI's crops with the same parameters."""
    views = ViewConfig(size=96, mask_ratio=0.3, mask_ratio_spread=0.2)
    dali, _ = loaders(detailed, views=views, backend=backend, device=torch.device(device))
    _, reference = loaders(detailed, views=views, backend="reference")
    assert assert_alike(dali.epoch(1), reference.epoch(1), mean_levels=2) == 1


@needs_dali
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_and_micro_batches_get_the_same_shares(
    beton: Beton, device: str, dtype: torch.dtype
) -> None:
    """On every rank, shares, order and length of an epoch equal ViewLoader's, image by image."""
    seen = []
    for rank in range(2):
        options = {"rank": rank, "world": 2, "accumulation": 2, "dtype": dtype}
        dali, _ = loaders(beton, device=torch.device(device), **options)
        _, plain = loaders(beton, **options)
        assert dali.steps_per_epoch == plain.steps_per_epoch == 3
        for epoch in range(2):
            assert assert_alike(dali.epoch(epoch), plain.epoch(epoch)) == 6
        seen += [i for batch in dali.epoch(0) for i in batch.index.tolist()]
    assert len(seen) == len(set(seen)) == 24


@needs_dali
@pytest.mark.parametrize("order", ["quasi-random", "sequential"])
def test_orders_are_the_loaders(beton: Beton, order: str) -> None:
    dali, plain = loaders(beton, order=order)
    assert assert_alike(dali.epoch(1), plain.epoch(1)) == 3


@needs_dali
def test_start_in_mid_epoch_reads_nothing_of_what_is_skipped(tmp_path: Path) -> None:
    """A resumed run must not read skipped records: here these cannot even be decoded."""
    path = write_beton(tmp_path / "a.beton", varied(IMAGES))
    dali, plain = loaders(Beton(path), accumulation=2)
    for i in dali.shares(5)[:2].ravel():
        damage(path, int(dali.beton.records[i, 0]), bytes(20))
    assert assert_alike(dali.epoch(5, start=1), plain.epoch(5, start=1)) == 4
    assert list(dali.epoch(5, start=3)) == []
    assert dali.replaced == {}


@needs_dali
@devices
def test_raw_records_are_fed_as_pixels(tmp_path: Path, device: str) -> None:
    """ffcv can store raw pixels, which need no decoder."""
    beton = Beton(write_beton(tmp_path / "raw.beton", varied(9), mode="raw"))
    dali, _ = loaders(beton, batch_size=9, device=torch.device(device))
    _, plain = loaders(beton, batch_size=9)
    assert assert_alike(dali.epoch(0), plain.epoch(0)) == 1


@needs_dali
@devices
def test_every_kind_of_jpeg_decodes_alike(tmp_path: Path, device: str) -> None:
    """Grey, progressive and every chroma subsampling, with odd sides, and a converted PNG."""
    image = Image.fromarray(photograph(1, 77, 101))
    for subsampling in (0, 1, 2):
        save(tmp_path / f"in/{subsampling}.jpg", image, subsampling=subsampling)
        save(tmp_path / f"in/{subsampling}p.jpg", image, subsampling=subsampling, progressive=True)
    save(tmp_path / "in/grey.jpg", image.convert("L"))
    save(tmp_path / "in/restarts.jpg", image, restart_marker_blocks=3)
    save(tmp_path / "in/z.png", image)
    run("folder", tmp_path / "in", tmp_path / "a.beton")
    beton = Beton(tmp_path / "a.beton")
    views = ViewConfig(size=32, **GEOMETRY)
    dali, _ = loaders(beton, len(beton), views, device=torch.device(device))
    _, plain = loaders(beton, len(beton), views)
    assert assert_alike(dali.epoch(0), plain.epoch(0)) == 1


# ---- Bad records ----


def spoil(path: Path, how: str, which: list[int]) -> None:
    """Damage records of a beton. Only the first kind reliably makes DALI fail."""
    for pointer, size in Beton(path).records[which, :2].tolist():
        match how:
            case "header":
                damage(path, pointer, bytes(20))
            case "end":
                damage(path, pointer + size - 100, bytes(100))
            case "middle":
                damage(path, pointer + size * 3 // 4, bytes(40))


@needs_dali
@devices
@pytest.mark.parametrize("manifest", ["none", "before", "after"])
@pytest.mark.parametrize("how", ["header", "end", "middle"])
def test_corrupt_record_ends_the_epoch_when_it_is_reached(
    tmp_path: Path, how: str, manifest: str, device: str
) -> None:
    """DALI decodes most damaged records without an error; when it refuses one, it drops the whole
    batch.
    """
    path = write_beton(tmp_path / "bad.beton", [photograph(i, 90, 120) for i in range(12)])
    if manifest == "before":
        write_manifest(path)
    bad = int(dali_loader(Beton(path), batch_size=4).shares(0)[2][1])
    spoil(path, how, [bad])
    if manifest == "after" and how != "middle":  # a checksum that matches the damaged bytes
        write_manifest(path)
    dali = dali_loader(Beton(path), batch_size=4, device=torch.device(device))
    name = f"record {bad}:" if manifest == "none" or how == "middle" else f"photos/{bad}.jpg:"
    if manifest == "before":
        name = f"photos/{bad}.jpg:"
    batches = dali.epoch(0)
    count = 0
    with pytest.raises(CorruptRecord, match=name):
        for _ in batches:
            count += 1
    if manifest != "after":
        assert count == 2
    assert len(next(dali.epoch(0)).index) == 4  # the loader stays usable


@needs_dali
@devices
@pytest.mark.parametrize("how", ["header", "middle"])
def test_replacement_is_the_loaders(
    tmp_path: Path, how: str, device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With both loaders, index, boxes and pixels are those of the next good image."""
    images = [photograph(i, 60 + i, 80) for i in range(IMAGES)]
    path = write_beton(tmp_path / "spoilt.beton", images)
    write_manifest(path)
    spoil(path, how, [4, 5, 6, IMAGES - 1])
    for rank in range(2):
        options = {"world": 2, "rank": rank, "on_corrupt": "replace", "batch_size": IMAGES}
        options["max_replaced"] = 0.2
        dali, _ = loaders(Beton(path), device=torch.device(device), **options)
        _, plain = loaders(Beton(path), **options)
        capfd.readouterr()
        for epoch in range(2):
            assert assert_alike(dali.epoch(epoch), plain.epoch(epoch)) == 1
        assert dali.replaced == plain.replaced and dali.replaced
        warnings = [line for line in capfd.readouterr().err.splitlines() if "replaces" in line]
        assert len(warnings) == 2 * len(dali.replaced)  # once for each loader


@needs_dali
@devices
@pytest.mark.parametrize("on_corrupt", ["stop", "replace"])
def test_record_that_goes_bad_in_a_running_loader(
    tmp_path: Path, on_corrupt: str, device: str
) -> None:
    """The record passed its check earlier. DALI's error must start a search for the bad record. If
    its replacement goes bad too, the loader must not return to it for ever.
    """
    path = write_beton(tmp_path / "a.beton", varied(12))
    options = {"on_corrupt": on_corrupt, "max_replaced": 0.5, "device": torch.device(device)}
    dali = dali_loader(Beton(path), batch_size=4, **options)
    assert len(list(dali.epoch(0))) == 3
    spoil(path, "header", [5, 9])
    if on_corrupt == "stop":
        with pytest.raises(CorruptRecord, match=r"record [59]: not a JPEG"):
            list(dali.epoch(1))
        return
    index = [i for batch in dali.epoch(1) for i in batch.index.tolist()]
    assert sorted(index) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 10, 10, 11]
    assert dali.replaced == {5: 6, 9: 10}
    spoil(path, "header", [6])
    index = [i for batch in dali.epoch(2) for i in batch.index.tolist()]
    assert sorted(index) == [0, 1, 2, 3, 4, 7, 7, 7, 8, 10, 10, 11]
    assert dali.replaced == {5: 6, 6: 7, 9: 10}


@needs_dali
def test_file_cut_short_under_a_running_loader(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "a.beton", varied(12))
    dali = dali_loader(Beton(path), batch_size=1)
    batches = dali.epoch(0)
    next(batches)
    os.truncate(path, int(dali.beton.records[:, 0].min()) + 1)
    with pytest.raises(UserError, match="the file was written to while it was in use"):
        list(batches)


@needs_dali
def test_beton_of_which_nothing_decodes_is_an_error(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "ruin.beton", varied(5))
    spoil(path, "header", list(range(5)))
    with pytest.raises(CorruptRecord, match="no record can be decoded"):
        options = {"on_corrupt": "replace", "max_replaced": 1.0}
        list(dali_loader(Beton(path), batch_size=5, **options).epoch(0))


@needs_dali
@devices
@pytest.mark.parametrize("manifest", [False, True])
def test_abbreviated_and_damaged_jpegs_are_judged_as_by_the_loader(
    tmp_path: Path, manifest: bool, device: str
) -> None:
    """Without it DALI completes a stream that has lost its tables as its own decoder likes, even if
    the manifest lists it, as one of an earlier slotstream may.
    """
    names = [name for name in pool() if not manifest or "table" in name or "bad" not in name]
    path = tmp_path / "pool.beton"
    with BetonWriter(path, len(names)) as writer:
        streams = [pool()[name] for name in names]
        writer.append([Sample(stream, HEIGHT, WIDTH, (i,)) for i, stream in enumerate(streams)])
    if manifest:
        write_manifest(path)
    options = {"on_corrupt": "replace", "max_replaced": 1.0, "batch_size": len(names)}
    dali, _ = loaders(Beton(path), device=torch.device(device), **options)
    _, plain = loaders(Beton(path), **options)
    for epoch in range(2):
        assert assert_alike(dali.epoch(epoch), plain.epoch(epoch)) == 1
    assert set(dali.replaced) == {i for i, name in enumerate(names) if "bad" in name}
    assert dali.replaced == plain.replaced


# ---- Nothing is left behind ----


def held() -> tuple[int, int]:
    """Numbers of threads (including DALI's) and of open files of this process."""
    process = psutil.Process()
    return process.num_threads(), process.num_fds()


def grown(before: tuple[int, int]) -> bool:
    """Whether more is held now. Less is possible: other tests' resources may have been freed."""
    return any(now > then for now, then in zip(held(), before, strict=True))


@needs_dali
@devices
def test_early_end_and_many_epochs_leave_nothing_behind(beton: Beton, device: str) -> None:
    """Breaks if an epoch builds a pipeline, starts threads, or passes batches to the next epoch."""
    dali, plain = loaders(beton, device=torch.device(device))
    assert_alike(dali.epoch(0), plain.epoch(0))
    before = held()
    for epoch in range(20):
        for step, _ in enumerate(dali.epoch(epoch)):
            if step == epoch % 4:
                break
    assert not grown(before)
    assert assert_alike(dali.epoch(7), plain.epoch(7)) == 3


@needs_dali
def test_second_epoch_ends_the_first(beton: Beton) -> None:
    """Epochs share one pipeline: one must not yield, or end, the batches of the other."""
    dali, plain = loaders(beton)
    first, second = dali.epoch(0), dali.epoch(1)
    next(first)
    batches = [next(second)]
    with pytest.raises(RuntimeError, match="its loader has begun another one"):
        next(first)
    del first
    assert assert_alike(iter([*batches, *second]), plain.epoch(1)) == 3


@needs_dali
def test_loader_that_is_freed_frees_its_pipeline(beton: Beton) -> None:
    """Pipelines of consecutive runs, or of training and evaluation, must not accumulate."""
    list(dali_loader(beton).epoch(0))
    gc.collect()
    before = held()
    for _ in range(3):
        dali = dali_loader(beton)
        next(dali.epoch(0))
        assert grown(before)
        del dali
        gc.collect()
    assert not grown(before)


@needs_dali
def test_forked_child_leaves_the_pipeline_alone(beton: Beton) -> None:
    """A child that garbage-collects the pipeline would wait for threads that it does not have."""
    dali = dali_loader(beton)
    next(dali.epoch(0))
    cycle = [dali]
    cycle.append(cycle)
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    gc.disable()
    try:
        del dali, cycle  # from here on only the garbage collector reaches the loader
        child.start()
    finally:
        gc.enable()
    child.join(30)
    child.kill()
    assert child.exitcode == 0


# ---- Not installed ----


def test_missing_dali_is_one_line_with_the_command(
    beton: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI is an optional dependency: a user who selects it must learn how to install it."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install slotstream\[dali\]"):
        dali_loader(beton)
