"""The benchmark's stages do the work that their names say."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import turbojpeg
from pipeline.beton import Beton
from tests.helpers.betons import varied, write_beton
from tools.benchmark import decoders
from tools.benchmark import stages as benchmark_stages
from tools.benchmark.timing import Bench
from train.config import load_config

IMAGES = 10


@pytest.fixture
def beton(tmp_path: Path) -> Beton:
    return Beton(write_beton(tmp_path / "photos.beton", varied(IMAGES)))


def test_whole_records_are_read_and_pages_are_forgotten_for_the_disk(
    beton: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes, or the page cache under the disk's name, would give a false rate."""
    log: list[tuple[str, int, int]] = []
    pread = os.pread

    def reading(file: int, count: int, pointer: int) -> bytes:
        log.append(("read", pointer, count))
        return pread(file, count, pointer)

    def advising(file: int, pointer: int, count: int, advice: int) -> None:
        assert file == beton.file and advice == os.POSIX_FADV_DONTNEED
        log.append(("forget", pointer, count))

    monkeypatch.setattr(os, "pread", reading)
    monkeypatch.setattr(os, "posix_fadvise", advising)
    config, _ = load_config(["--name", "none", "--data.path", "none"])
    benchmark_stages.read(
        Bench(
            config=config, beton=beton, batch=4, threads=(1,), repeats=1, seconds=1e-6,
            images=IMAGES, device=torch.device("cpu"), backends=("kornia",),
        )
    )  # fmt: skip
    records = sorted(map(tuple, beton.records[:, :2].tolist()))
    first = next(at for at, entry in enumerate(log) if entry[0] == "forget")
    cached, disk = log[:first], log[first : first + 2 * IMAGES]
    assert len(cached) % IMAGES == 0
    assert [name for name, *_ in disk] == ["forget"] * IMAGES + ["read"] * IMAGES
    for part in (cached[:IMAGES], disk[:IMAGES], disk[IMAGES:]):
        assert sorted(entry[1:] for entry in part) == records


def test_the_ceiling_decodes_as_the_loader_does(
    beton: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image in full and with the same DCT; otherwise the two rates are not comparable."""
    made: list[np.ndarray] = []
    decompress = turbojpeg.Decoder.decompress

    def recording(self: turbojpeg.Decoder, jpeg: np.ndarray, pixels: np.ndarray) -> str:
        complaint = decompress(self, jpeg, pixels)
        made.append(pixels.copy())
        return complaint

    monkeypatch.setattr(turbojpeg.Decoder, "decompress", recording)
    jpegs = benchmark_stages._jpegs(beton, np.arange(IMAGES))
    benchmark_stages._decode_part(beton, iter(jpegs))
    assert len(made) == IMAGES
    assert all(np.array_equal(pixels, beton.decode(i)) for i, pixels in enumerate(made))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_other_decoders_decode_the_same_images(beton: Beton, name: str, device: str) -> None:
    """Without it a decoder that skips or swaps images has a false rate, or an unknown error."""
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    jpegs = [jpeg for jpeg, *_ in benchmark_stages._jpegs(beton, np.arange(IMAGES))]
    decode = getattr(decoders, name)(jpegs, 4, 1, torch.device(device))
    decode()
    largest, mean = decoders.difference(decode, map(beton.decode, range(IMAGES)))
    assert mean < 1 and (device == "cuda" or largest == 0), (largest, mean)
    wrong = (pixels ^ 16 for pixels in map(beton.decode, range(IMAGES)))
    assert decoders.difference(decode, wrong)[1] > 14


def test_batches_are_those_of_training(beton: Beton) -> None:
    """A frozen teacher sees views at twice the side. Without it the benchmark times smaller views
    than the trainer makes, and the step gets half of what it needs."""
    frozen = [
        "--train.teacher", "frozen", "--train.teacher_momentum", "0", "--init.weights", "w",
        "--model.prototype_init", "kmeans", "--model.group_loss_weight", "1",
        "--train.teacher_resolution", "2", "--views.size", "32",
    ]  # fmt: skip
    config, _ = load_config(["--name", "x", "--data.path", str(beton.path), *frozen])
    bench = Bench(
        config=config, beton=beton, batch=2, threads=(1,), repeats=1, seconds=1e-6,
        images=IMAGES, device=torch.device("cpu"), backends=("reference",),
    )  # fmt: skip
    batch = next(benchmark_stages.batches(bench, "reference", "host", 2))
    assert batch.views.shape == (2, 2, 3, 64, 64)
