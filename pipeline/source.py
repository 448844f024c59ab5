"""What a batch is and which images it holds, however these are decoded and cropped.

A source has no state between epochs. The images of a step, their order and their views follow from
(seed, epoch, step, rank) alone. So a run resumes in the middle of an epoch without decoding the
images before that point.
"""

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.beton import Beton, CorruptRecord
from pipeline.choices import OnCorrupt, Order
from pipeline.errors import printable, require
from pipeline.order import block_order, epoch_shares, steps_per_epoch
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig, ViewParams, sample_views

EPOCH_HAS_ENDED = "this epoch has ended: its loader has begun another one"

_FIRST = 1000  # images of which the share of bad ones is first taken; one bad one proves nothing


@dataclass(frozen=True)
class Batch:
    """What the model sees of B images: two views each, and the geometry between them.

    views [2, B, 3, S, S] normalised, channels_last; overlap float32 [2, B, 4], the intersection of
    both crops as x1 y1 x2 y2 in the (0..1) frame of each view after its flip, not clipped (x2 <= x1
    or y2 <= y1 if the crops share no pixel); flipped bool [2, B]; index int64 [B], the images'
    numbers; masks bool [2, B, S / cell, S / cell], the cells of each view, after its flip, that are
    hidden from a student, or None if views.mask_ratio is 0. The views themselves are whole.
    """

    views: Tensor
    overlap: Tensor
    flipped: Tensor
    index: Tensor
    masks: Tensor | None = None


class BatchSource(ABC):
    """Batches of paired views of a beton's images, for one rank of a distributed run.

    `batch_size` counts the images of one optimiser step over all ranks and micro-batches. Each
    yielded batch holds batch_size / (world · accumulation) of them, and `accumulation` batches make
    a step. The last, partial step of an epoch is dropped, so that all ranks yield equally many
    batches. For `order` and `window_bytes` see `pipeline.order`. `views_of` gives how the views of
    an epoch are drawn, none larger than `views.size`; the default is `views`. `threads` threads
    decode. For `on_corrupt` see `pipeline.choices`; the index and views of a batch are those of the
    replacement. More than `max_replaced` of the images read is an error.

    A record must have the checksum in the manifest beside the beton, if there is one.

    Raises UserError if the batch cannot be divided equally, if the set is smaller than a batch, or
    if anyone has written to the file since it was opened.
    """

    replaced: dict[int, int]
    """The bad records that this rank has read so far, each with its replacement; the subclass sets
    it."""

    def __init__(
        self,
        beton: Beton,
        views: ViewConfig,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        order: Order = "random",
        window_bytes: int = 4_000_000_000,
        views_of: Callable[[int], ViewConfig] | None = None,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        threads: int = 1,
        on_corrupt: OnCorrupt = "stop",
        max_replaced: float = 0.05,
    ) -> None:
        beton.require_unchanged()
        beton.require_checksums()
        self.steps_per_epoch = steps_per_epoch(beton, batch_size, world, accumulation)
        self.beton, self.batch_size, self.seed = beton, batch_size, seed
        self.order, self.window_bytes = order, window_bytes
        self.views_of = views_of or (lambda epoch: views)
        self.device, self.dtype = device, dtype
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.threads, self.on_corrupt, self.max_replaced = threads, on_corrupt, max_replaced
        self._ahead = ReadAhead(beton) if order == "quasi-random" else None

    @abstractmethod
    def _batches(self, epoch: int, shares: np.ndarray) -> Iterator[Batch]:
        """The batches of `shares`, rows of an epoch's shares."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of `epoch` from step `start` on: `accumulation` for each step.
        Beginning an epoch ends the previous one. Raises ValueError if the epoch has no such step,
        and UserError, before and after all batches, if anyone has written to the file.
        """
        require(0 <= start <= self.steps_per_epoch, "start", start, "a step of the epoch")
        self.beton.require_unchanged()
        shares, first = self.shares(epoch), start * self.accumulation
        if self._ahead:
            blocks, windows = block_order(self.beton, self.seed, epoch, self.window_bytes)
            self._ahead.begin(blocks, windows, first / len(shares))
        for batches_read, batch in enumerate(self._batches(epoch, shares[first:]), first + 1):
            if self._ahead:
                self._ahead.reach(batches_read / len(shares))
            yield batch
        self.beton.require_unchanged()

    @property
    def images_per_batch(self) -> int:
        return self.batch_size // (self.world * self.accumulation)

    def shares(self, epoch: int) -> np.ndarray:
        """The records of this rank: int64 [steps · accumulation, images of a micro-batch]."""
        return epoch_shares(
            self.beton,
            self.batch_size,
            self.seed,
            epoch,
            self.order,
            self.window_bytes,
            self.rank,
            self.world,
            self.accumulation,
        )


def draw(beton: Beton, seed: int, epoch: int, which: np.ndarray, views: ViewConfig) -> ViewParams:
    """The view parameters of records `which` int64 [B]."""
    size = (beton.height[which], beton.width[which])
    return sample_views(seed, epoch, beton.index[which], *size, views)


def beside_views(beton: Beton, which: np.ndarray, params: ViewParams) -> list[np.ndarray]:
    """What a batch of these records holds beside its views, in the order of `Batch`'s fields."""
    arrays = (params.overlap, params.flipped, beton.index[which], params.masks)
    return [array for array in arrays if array is not None]


class ReadAhead:
    """Asks the kernel to read the blocks of a quasi-random epoch one window before they are
    needed.
    """

    def __init__(self, beton: Beton) -> None:
        self.beton = beton
        self._pool = ThreadPoolExecutor(1, "read-ahead")  # the kernel may block the caller
        self._blocks, self._window, self._requested = np.empty(0, np.int64), 0.0, 0

    def begin(self, blocks: np.ndarray, windows: int, share: float) -> None:
        """Start at `share` (0..1) of an epoch that reads `blocks` in this many windows."""
        self._blocks, self._window = blocks, len(blocks) / windows
        self._requested = math.floor(math.floor(share * windows) * self._window)
        self.reach(share)

    def reach(self, share: float) -> None:
        """Note that `share` of the epoch has been read; request the blocks of the next window."""
        end = math.ceil(share * len(self._blocks) + self._window)
        if end > self._requested:
            self._pool.submit(self.beton.advise, self._blocks[self._requested : end])
            self._requested = end


class Replacements:
    """Replaces records that cannot be decoded by the next record of the file that can be decoded.
    The replacement depends on nothing else, so it is the same on every rank and in every run.

    `known` maps each bad record so far to its replacement; each is reported once, on stderr. If
    more than a share `limit` of the images read so far is replaced, this is an error.
    """

    def __init__(self, beton: Beton, limit: float) -> None:
        self.beton, self.limit = beton, limit
        self.known: dict[int, int] = {}
        self._read = 0
        self._replaced: set[int] = set()  # of the records read; a search looks at others too
        self._first = ""

    def apply(self, which: np.ndarray) -> np.ndarray:
        """`which` int64 [B], which is read next, with its known bad records replaced."""
        self._read += len(which)
        if not self.known:
            return which
        self._replaced.update(self.known.keys() & which.tolist())
        self._check()
        return np.array([self._current(i) for i in which.tolist()])

    def find(self, i: int, reason: str) -> int:
        """The replacement of record `i`, which is bad for `reason`. The search continues with the
        first record after the last one. Raises CorruptRecord if no record can be decoded, or if too
        many are bad.
        """
        self._replaced.add(i)
        self._first = self._first or f"{printable(self.beton.name(i))}: {reason}"
        self._check()
        if i in self.known:  # an earlier batch has replaced it while this one was being decoded
            return self._current(i)
        bad = {i: reason}
        decoder = Decoder(int(self.beton.records[:, 1].max()))
        for j in itertools.chain(range(i + 1, len(self.beton)), range(i)):
            stand_in = self._current(j)
            shape = (1, self.beton.height[stand_in], self.beton.width[stand_in], 3)
            pixels = np.empty(shape, np.uint8)
            _, reason = self.beton.try_decode(np.array([stand_in]), pixels, decoder)
            if not reason:
                break
            bad[j] = reason
            if self.limit < 1 and len(bad) > self.limit * len(self.beton):
                raise self._too_many(len(bad), len(self.beton), "images")
        else:
            raise CorruptRecord(f"{self.beton.path}: no record can be decoded")
        name = printable(self.beton.name(stand_in))
        for k, why in bad.items():
            self.known[k] = stand_in
            error = self.beton.corrupt(k, why)
            print(f"warning: {error}; {name} replaces it", file=sys.stderr, flush=True)
        return stand_in

    def _current(self, i: int) -> int:
        """Record `i`, or its replacement; if that has gone bad since, the next replacement."""
        while i in self.known:
            i = self.known[i]
        return i

    def _check(self) -> None:
        """Raises CorruptRecord if too many records were replaced."""
        bad, images = len(self._replaced), len(self.beton)
        if bad > self.limit * min(max(self._read, _FIRST), images):
            raise self._too_many(bad, min(self._read, images), "images read so far")

    def _too_many(self, bad: int, images: int, which: str) -> CorruptRecord:
        return CorruptRecord(
            f"{self.beton.path}: at least {bad:,} of {images:,} {which} are bad"
            f" ({bad / images:.1%}; data.max_replaced: {self.limit:g});"
            f" the first one is {self._first}"
        )
