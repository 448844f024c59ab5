"""The loader's ring of buffers: when the decoding threads may write to it."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures.thread import _WorkItem
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.decode
import pipeline.order
from pipeline.beton import Beton
from pipeline.decode import CanvasLoader
from pipeline.loader import ViewLoader
from pipeline.source import Batch
from pipeline.views import ViewConfig
from tests.helpers.betons import varied, write_beton
from tests.pipeline.test_loader import ways


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return Beton(write_beton(tmp_path_factory.mktemp("ring") / "photos.beton", varied(26)))


def view_loader(beton: Beton, **options: Any) -> ViewLoader:
    values = {"seed": 3, "backend": "kornia", "device": torch.device("cpu"), "threads": 2}
    return ViewLoader(beton, ViewConfig(size=16), 8, **(values | options))


class Copied:
    """A stub for the event at the end of a copy to a GPU."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("waited")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The events in order: "decode" (threads may write to a buffer), "copy" (started), "waited"."""
    log: list[str] = []
    copy, submit = ViewLoader._copy, pipeline.decode.RecordLoader._submit

    def copying(loader: ViewLoader, *arguments: Any) -> Any:
        log.append("copy")
        return copy(loader, *arguments)[0], Copied(log)

    def submitting(*arguments: Any) -> Any:
        log.append("decode")
        return submit(*arguments)

    monkeypatch.setattr(ViewLoader, "_copy", copying)
    monkeypatch.setattr(pipeline.decode.RecordLoader, "_submit", submitting)
    return log


@ways
def test_pixels_are_not_written_while_they_are_copied(
    beton: Beton, way: dict[str, str], log: list[str]
) -> None:
    """On a GPU the copy continues after the call, so a batch could hold parts of a later one. The
    first epoch ends by exhaustion, the second by the start of another, as in the trainer."""
    loader = view_loader(beton, **way)
    assert len(list(loader.epoch(0))) == 3
    assert log == ["decode"] * 3 + ["copy", "waited"] * 3
    log.clear()
    batches = loader.epoch(1)
    for _ in range(3):
        next(batches)
    next(loader.epoch(2))
    assert log == ["decode"] * 3 + ["copy", "waited"] * 3 + ["decode"] * 3 + ["copy"]


@ways
def test_a_later_epoch_ends_the_one_before(beton: Beton, way: dict[str, str]) -> None:
    """Epochs share the buffers: views of the first would silently become those of the second."""
    loader = view_loader(beton, **way)
    old: Iterator[Batch] = loader.epoch(0)
    next(old)
    new = loader.epoch(1)
    first = next(new)
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(old)
    views = torch.cat([batch.views for batch in (first, *new)], dim=1)
    alone = torch.cat([batch.views for batch in view_loader(beton, **way).epoch(1)], dim=1)
    assert torch.equal(views, alone)


def test_no_thread_writes_after_an_early_end(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next epoch uses the same buffers."""
    running: list[int] = []
    try_decode = Beton.try_decode

    def slowly(beton: Beton, which: np.ndarray, *rest: Any) -> tuple[int, str]:
        running.append(1)
        time.sleep(0.02)
        result = try_decode(beton, which, *rest)
        running.pop()
        return result

    monkeypatch.setattr(Beton, "try_decode", slowly)
    batches = view_loader(beton).epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not running


@ways
def test_reading_ahead_follows_the_epoch(
    beton: Beton, way: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if only the first windows of a quasi-random epoch are requested."""
    monkeypatch.setattr(pipeline.order, "BLOCK", 1 << 11)
    requested: list[int] = []
    monkeypatch.setattr(Beton, "advise", lambda self, blocks: requested.extend(blocks.tolist()))
    loader = view_loader(beton, **way, order="quasi-random", window_bytes=1 << 12)
    batches = loader.epoch(0)
    next(batches)
    assert loader._ahead
    loader._ahead._pool.submit(int).result()  # the requests so far are done
    early = len(requested)
    for _ in batches:
        pass
    loader._ahead._pool.submit(int).result()
    blocks = np.unique(beton.records[:, 0] >> 11)
    assert 0 < early < len(blocks) and sorted(requested) == blocks.tolist()


@ways
def test_buffers_are_pinned_for_a_gpu(
    beton: Beton, way: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With unpinned memory the host would wait for each copy."""
    pinned: list[bool] = []
    empty = torch.empty

    def recording(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    loader = view_loader(beton, **way, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch, "empty", recording)
    next(iter(loader._records.decode([np.arange(4)])))
    assert pinned == [True]


def test_pinned_buffers_count_as_what_they_take(beton: Beton) -> None:
    """PyTorch pins powers of two: buffers of 600 MB take 1 GiB each, and may not fit."""
    exact, pinned = (CanvasLoader(beton, 1, pin).worst_case(5) for pin in (False, True))
    assert exact % 3 == 0 and pinned == 3 * 2 ** (exact // 3 - 1).bit_length()


def test_finished_views_stay_with_their_receiver(
    beton: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU no copy is made: views would become those of a later batch, and silently. A part of
    them is enough to hold a batch; what nobody holds is used again, also if a thread is interrupted
    before it forgets what it has written to.
    """
    run, count = _WorkItem.run, itertools.count()

    def slow(item: Any) -> None:
        run(item)
        if next(count) % 29 == 0:
            time.sleep(0.1)

    monkeypatch.setattr(_WorkItem, "run", slow)
    loader = view_loader(beton, crops="host", backend="compiled")
    kept = [
        (batch.views[1, 2:4].flatten(), batch.views[1, 2:4].flatten().clone())
        if epoch % 2
        else (batch.views[0].detach(), batch.views[0].clone())
        for epoch in range(4)
        for batch in loader.epoch(epoch)
    ]
    assert all(torch.equal(views, copy) for views, copy in kept)
    kept.clear()
    places = {batch.views.data_ptr() for epoch in range(4) for batch in loader.epoch(epoch)}
    assert len(places) <= 4
    crops = view_loader(beton, crops="host")._records.worst_case(1000)
    size, views = 1000 * 2 * 16 * 16 * 3, loader._records.worst_case(1000)
    assert views - crops == (4 * 4 - 3) * size
