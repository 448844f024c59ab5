"""The data path alone: batches of paired views for any training loop."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from pipeline.choices import BACKENDS, CROPS, ORDERS, AnyCrops, OnCorrupt, Order
from pipeline.errors import UserError
from pipeline.image_folder import open_beton
from pipeline.loader import make_loader
from pipeline.source import Batch
from pipeline.views import ViewConfig
from slotstream.arguments import device_of, dtype_of, one_of, path_of, whole

MANY = 2**63
"""Whole numbers are below this one."""


class Loader:
    """The batches of a beton, epoch after epoch; one `for` loop reads the present epoch to its end.

    Each `Batch` has two views of B images and the geometry between them: views [2, B, 3, S, S],
    normalised; overlap [2, B, 4], flipped [2, B], index [B]. With views={"mask_ratio": 0.3} it also
    has block masks for masked image modelling: masks bool [2, B, S / 16, S / 16], True where a cell
    of 16 pixels (views.mask_cell) is to be hidden; the views are whole. Every image, and everything
    random about its views, follows from (seed, epoch, index). So the batches are the same with any
    number of threads, and a loader that continues from a `state_dict` gives exactly those left.

    Args:
        path: the beton; or a folder of images, which takes longer.
        batch_size: images of a step, over all ranks; B is this divided by their number.
        size: side S of a view in pixels.
        views: further settings of the views, by their names in `slotstream train --help`
            (views.min_scale, …).
        seed: of order and views.
        device: of the batches; by default the GPU if there is one.
        dtype: of the views.
        order: "random", "quasi-random" (for a file larger than memory) or "sequential".
        rank, world: this process and the number of processes; by default those of
            torch.distributed, if it is initialised.
        threads: that decode; by default all cores.
        backend, crops, on_corrupt: as data.backend, data.crops and data.on_corrupt there.

    Raises:
        UserError: for a file that is no beton, a damaged one, a batch larger than the data set, an
            argument that cannot be.

    >>> import slotstream
    >>> loader = slotstream.Loader("sample.beton", batch_size=4, size=96, device="cpu")
    >>> batch = next(iter(loader))
    >>> batch.views.shape
    torch.Size([2, 4, 3, 96, 96])
    >>> state = loader.state_dict()  # after the first batch
    >>> again = slotstream.Loader("sample.beton", batch_size=4, size=96, device="cpu")
    >>> again.load_state_dict(state)
    >>> sum(1 for _ in again) == len(again) - 1
    True
    """

    def __init__(
        self,
        path: Path | str,
        batch_size: int,
        *,
        size: int = 224,
        views: dict[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        order: Order = "random",
        rank: int | None = None,
        world: int | None = None,
        threads: int | None = None,
        backend: str = "auto",
        crops: AnyCrops = "auto",
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        self.device = device_of(device)
        together = dist.is_available() and dist.is_initialized()
        try:
            drawn = ViewConfig(**{"size": size, **(views or {})})
        except (TypeError, ValueError) as error:
            raise UserError(f"views: {error}") from None
        if world is None:
            world = dist.get_world_size() if together else 1
        if rank is None:
            rank = dist.get_rank() if together else 0
        world = whole("world", world, 1, MANY)
        self._source = make_loader(
            open_beton(path_of(path)),
            drawn,
            whole("batch_size", batch_size, 1, MANY),
            seed=whole("seed", seed, 0, MANY),
            device=self.device,
            dtype=dtype_of(dtype),
            order=one_of("order", order, ORDERS),
            rank=whole("rank", rank, 0, world),
            world=world,
            threads=whole("threads", threads or len(os.sched_getaffinity(0)), 1, MANY),
            backend=one_of("backend", backend, ("auto", *BACKENDS)),
            crops=one_of("crops", crops, ("auto", *CROPS)),
            on_corrupt=one_of("on_corrupt", on_corrupt, get_args(OnCorrupt)),
        )
        self._views = drawn
        self.epoch, self.step = 0, 0
        """Where the next batch lies."""

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._source.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches from here to the end of the epoch. A loop that ends before continues in the
        next `for`. Beginning a loop ends an earlier one.
        """
        for batch in self._source.epoch(self.epoch, self.step):
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values: where the next batch lies, and what must be the same to find it there."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with any number of ranks. Raises UserError if that was
        a loader of other batches.
        """
        older = {"views": {**_plain(ViewConfig()), **state.get("views", {})}}  # than a setting
        for name, value in self._identity().items():
            if (was := older.get(name, state.get(name))) != value:
                raise UserError(f"state: {name} was {was!r}, is {value!r}")
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, Any]:
        """What the images, order and views of each batch depend on, besides epoch and step."""
        source = self._source
        return {
            "data": source.beton.fingerprint(),
            "batch_size": source.batch_size,
            "seed": source.seed,
            "order": source.order,
            "views": _plain(self._views),
        }


def _plain(views: ViewConfig) -> dict[str, Any]:
    """Tuples as lists, as in a file."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(views)))
    return values
