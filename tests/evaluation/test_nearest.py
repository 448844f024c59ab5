"""The search for the nearest cells, against all distances in float64; where a memory may lie."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.probes import nearest, storage
from evaluation.probes.nearest import Distance, NearestCells, _Part, decoded, encoded
from evaluation.probes.storage import Storage, searching_devices
from pipeline.errors import UserError

CPU = torch.device("cpu")


def vectors(count: int, dim: int, seed: int, scale: float = 0.0) -> Tensor:
    """Normal numbers, the later features smaller by powers of `scale`, vectors of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, dim, generator=generator)
    return drawn * (-scale * torch.arange(dim)).exp() * torch.rand(count, 1, generator=generator)


def naive(queries: Tensor, cells: Tensor, distance: str) -> Tensor:
    """All values [Q, M] in float64, the highest for the nearest cell."""
    queries, cells = queries.double(), cells.double()
    if distance == "cosine":
        return torch.cosine_similarity(queries[:, None], cells, dim=2)
    return queries @ cells.T - cells.square().sum(dim=1) / 2


@pytest.fixture(params=["bounds", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The search by bounds, which is for a CPU, and the one for a GPU, on the CPU."""
    monkeypatch.setattr(nearest, "SAMPLE", 50)
    if request.param == "products":
        monkeypatch.setattr(nearest, "PRODUCTS", 9 * 32)
        monkeypatch.setattr(_Part, "_by_bounds", lambda part, *args: part._by_products(*args[:2]))
    return str(request.param)


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize("scale", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 3])
def test_equals_all_distances(
    way: str, distance: Distance, count: int, scale: float, parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without it bounds, blocks or parts could lose a neighbour, and no score would show it."""
    monkeypatch.setattr(nearest, "COLUMNS", 32)
    monkeypatch.setattr(nearest, "ROWS", 4)
    queries, cells = vectors(9, 40, 0, scale), vectors(400, 40, 1, scale)
    among = torch.arange(400) % 5 > 0
    for inside in (None, among):
        expected = naive(queries, cells, distance)
        expected = expected if inside is None else expected.masked_fill(~inside, -torch.inf)
        found = int(400 if inside is None else inside.sum())
        best = expected.topk(min(count, found))
        search = NearestCells(cells, distance=distance, among=inside, devices=[CPU] * parts)
        values, numbers = search(queries, count)
        torch.testing.assert_close(values, best.values.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(numbers, best.indices)


def test_bounds_save_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the search could compute every product, and still be right: no result shows it."""
    monkeypatch.setattr(nearest, "SAMPLE", 50)
    monkeypatch.setattr(nearest, "COLUMNS", 64)
    widths: list[int] = []
    multiply = nearest.multiply

    def watched(queries: Tensor, *more: Any) -> np.ndarray:
        widths.append(queries.shape[1])
        return multiply(queries, *more)

    monkeypatch.setattr(nearest, "multiply", watched)
    queries, cells = vectors(9, 40, 0, 0.3), vectors(64 * 32, 40, 1, 0.3)
    search = NearestCells(cells)
    search(queries, 5)
    directions = search.parts[0].directions
    assert directions is not None and directions.shape[1] < 10
    assert widths.count(41) <= 8 < 24 <= widths.count(directions.shape[1] + 1)
    assert NearestCells(vectors(400, 40, 1)).parts[0].directions is None  # no direction stands out


@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_ties_go_to_the_lower_number(way: str, distance: Distance) -> None:
    """Without it another batch, machine or version could give other neighbours and scores."""
    cells = vectors(30, 8, 0).repeat(9, 1)
    _, numbers = NearestCells(cells, distance=distance, devices=[CPU, CPU])(cells[:30], 12)
    copies = torch.arange(9) * 30
    assert torch.equal(numbers[:, :9], torch.arange(30)[:, None] + copies)


@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_same_to_the_last_bit_for_any_blocks(
    distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of matrices rounds by its shape. Without it scores would depend on --batch and on
    the number of threads.
    """
    queries, cells = vectors(50, 33, 0, 0.1), vectors(700, 33, 1, 0.1)
    values, numbers = NearestCells(cells, distance=distance)(queries, 9)
    for rows, columns, sample, threads in ((1, 37, 50, 1), (64, 9, 50, 2), (7, 256, 2000, 2)):
        monkeypatch.setattr(nearest, "ROWS", rows)
        monkeypatch.setattr(nearest, "COLUMNS", columns)
        monkeypatch.setattr(nearest, "SAMPLE", sample)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        again = NearestCells(cells, distance=distance)(queries, 9)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], numbers)


def test_half_precision_is_searched_exactly_and_in_place(way: str) -> None:
    """Without it the memory would be there twice, in half or in full precision."""
    queries, cells = vectors(9, 40, 0), vectors(400, 40, 1).half()
    search = NearestCells(cells)
    assert search.parts[0].features.data_ptr() == cells.data_ptr()
    found, expected = search(queries, 5), NearestCells(cells.float())(queries, 5)
    assert torch.equal(found[1], expected[1])


def test_codes_keep_values_and_order() -> None:
    """Parts are merged by codes: a wrong sign would put the farthest cells first."""
    values = torch.tensor([-torch.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    numbers = torch.tensor([1, 2**32 - 1, 5, 7, 6, 0, 2**31])
    codes = encoded(values, numbers)
    assert torch.equal(decoded(codes)[0], values)
    assert torch.equal(decoded(codes)[1], numbers)
    assert (codes.diff() > 0).all()
    assert encoded(values[2:3], torch.tensor([4])) > codes[2]


# ---- where a memory lies --------------------------------------------------------------------


def test_too_large_a_memory_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the machine would swap or kill the command after hours of work."""
    monkeypatch.setattr(storage, "free_bytes", lambda place: 2**30)
    with pytest.raises(
        UserError, match=r"1,000,000 cells of 384 features needs 1\.5 GiB, 1\.0 GiB"
    ):
        Storage().allocate(10**6, 384, 100, CPU)
    with pytest.raises(UserError, match=r"--memory 590\d\d\d fits; --memory-precision float16 and"):
        Storage(anywhere=True).allocate(10**6, 384, 100, CPU)
    half = Storage(torch.float16, anywhere=True).allocate(10**6, 384, 100, CPU)
    assert half.dtype == torch.float16 and half.shape == (10**6, 384)


def test_what_a_gpu_has_no_room_for_lies_in_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a memory beyond one GPU could not be searched. k-NN alone can search elsewhere."""
    free = {"cuda": 2**20, "cpu": 2**34}
    monkeypatch.setattr(storage, "free_bytes", lambda place: free[place.type])
    gpu = torch.device("cuda")
    kept = Storage(anywhere=True).allocate(1000, 384, 100, gpu)
    assert kept.device.type == "cpu"
    with pytest.raises(UserError, match=r"--memory 576 fits$"):
        Storage().allocate(1000, 384, 100, gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert searching_devices(kept, gpu) == gpus
    free["cuda"] = 2**19
    assert searching_devices(kept, gpu) == [CPU]
    assert searching_devices(kept, CPU) == [CPU]


def test_memory_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file left behind would fill the disk; a full disk must be said, not kill the process."""
    monkeypatch.setattr(storage, "free_bytes", lambda place: 2**20)
    features = Storage(folder=tmp_path).allocate(1000, 384, 100, CPU)
    assert not list(tmp_path.iterdir())
    features[:] = vectors(1000, 384, 0)
    assert torch.equal(NearestCells(features)(features[5:9], 1)[1][:, 0], torch.arange(5, 9))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"--memory-folder .*: [\d.]+ GiB, [\d.]+ GiB are free"):
        Storage(folder=tmp_path).place(10**6, 10**9, 0, CPU)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"--memory-folder .*: No space left on device"):
        Storage(folder=tmp_path).allocate(1000, 384, 100, CPU)
    with pytest.raises(UserError, match=r"--memory-folder .*: No such file or directory"):
        Storage(folder=tmp_path / "none").allocate(1000, 384, 100, CPU)
    assert not list(tmp_path.iterdir())
