"""From a beton to the batches that the model sees: read, decode once, crop on the device.

A loader has no state between epochs: which images a step holds, in which order, and their views
follow from (seed, epoch, step, rank) alone, so a run resumes in mid-epoch without decoding what it
skips.
"""

import itertools
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.augment import get_backend
from pipeline.beton import Beton, CorruptRecord
from pipeline.errors import UserError, printable
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig, sample_views

_AHEAD = 2  # batches being decoded while one is consumed
_SLICES_PER_THREAD = 4  # small enough that threads finish together, large enough to amortise a call

OnCorrupt = Literal["stop", "replace"]
_Bad = dict[int, str]  # why the images at these places could not be decoded
_Part = tuple[int, Future[_Bad]]  # where a slice of a batch begins, and its decoding


@dataclass(frozen=True)
class Batch:
    """What the model sees of B images: two views each, and how the views lie on each other.

    views [2, B, 3, S, S] normalised, channels_last; overlap float32 [2, B, 4], the crops'
    intersection x1 y1 x2 y2 in each view's own (0..1) frame after its flip; flipped bool [2, B];
    index int64 [B], the images' numbers.
    """

    views: Tensor
    overlap: Tensor
    flipped: Tensor
    index: Tensor


class CanvasLoader:
    """Decodes lists of records into padded uint8 canvases, `threads` at a time, a few batches
    ahead.

    The canvases form a small ring of (on request pinned) buffers that are reused; they grow to the
    largest batch met.

    A record that cannot be decoded ends the iteration (`on_corrupt` "stop") or gives its place to
    the next record of the file that can ("replace"), the same one whoever asks and whenever.
    `replaced` holds those met so far, with what took their place; each is reported once, on stderr.
    """

    def __init__(
        self, beton: Beton, threads: int, pin: bool, on_corrupt: OnCorrupt = "stop"
    ) -> None:
        self.beton = beton
        self.threads = threads
        self.pin = pin
        self.on_corrupt = on_corrupt
        self.replaced: dict[int, int] = {}
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=self._start_thread)
        self._ring = [torch.empty(0, dtype=torch.uint8) for _ in range(_AHEAD + 1)]

    def _start_thread(self) -> None:
        self._own.decoder = Decoder(int(self.beton.records[:, 1].max()))

    def decode(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (which int64 [B], canvas uint8 [B, Hmax, Wmax, 3]) for each of `batches`, in order.

        A canvas holds image b in its top left corner and is valid until the next one is asked for.
        `which` names the records that are on it: not quite those asked for where one was replaced.
        Raises CorruptRecord when the batch with the bad record is reached.
        """
        pending: deque[tuple[np.ndarray, Tensor, list[_Part]]] = deque()
        try:
            for step in range(len(batches) + _AHEAD):
                if step < len(batches):
                    pending.append(self._submit(batches[step], step % len(self._ring)))
                if step >= _AHEAD:
                    which, canvas, parts = pending[0]
                    bad = {
                        begin + b: reason
                        for begin, part in parts
                        for b, reason in part.result().items()
                    }
                    yield self._replace(which, canvas, bad) if bad else (which, canvas)
                    pending.popleft()
        finally:  # an early end: no thread may still write when the ring is used again
            for _, _, parts in pending:
                for _, part in parts:
                    if not part.cancel():
                        part.exception()

    def _submit(self, which: np.ndarray, slot: int) -> tuple[np.ndarray, Tensor, list[_Part]]:
        if self.replaced:
            which = np.array([self.replaced.get(i, i) for i in which.tolist()])
        shape = (len(which), self.beton.height[which].max(), self.beton.width[which].max(), 3)
        canvas = self._canvas(slot, shape)
        pixels = canvas.numpy()
        slices = np.array_split(
            np.arange(len(which)), min(len(which), self.threads * _SLICES_PER_THREAD)
        )
        parts = [
            (
                int(s[0]),
                self._pool.submit(
                    self._decode_slice, which[s[0] : s[-1] + 1], pixels[s[0] : s[-1] + 1]
                ),
            )
            for s in slices
        ]
        return which, canvas, parts

    def _decode_slice(self, which: np.ndarray, canvas: np.ndarray) -> _Bad:
        bad: _Bad = {}
        begin = 0
        while begin < len(which):
            place, reason = self.beton.try_decode(which[begin:], canvas[begin:], self._own.decoder)
            if not reason:
                break
            if self.on_corrupt == "stop":
                raise self.beton.corrupt(int(which[begin + place]), reason)
            bad[begin + place] = reason
            begin += place + 1
        return bad

    def _replace(self, which: np.ndarray, canvas: Tensor, bad: _Bad) -> tuple[np.ndarray, Tensor]:
        """The batch with another image in each bad place; a larger canvas if one needs it."""
        which = which.copy()
        for b, reason in bad.items():
            which[b] = self._substitute(int(which[b]), reason)
        height, width = self.beton.height[which].max(), self.beton.width[which].max()
        if height > canvas.shape[1] or width > canvas.shape[2]:
            small = canvas
            shape = (len(which), max(height, small.shape[1]), max(width, small.shape[2]), 3)
            canvas = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)
            canvas[:, : small.shape[1], : small.shape[2]] = small
        for b in bad:
            image = torch.from_numpy(self.beton.decode(int(which[b])))
            canvas[b, : image.shape[0], : image.shape[1]] = image
        return which, canvas

    def _substitute(self, i: int, reason: str) -> int:
        """The next record that can be decoded; after the last one comes the first."""
        if i in self.replaced:  # by an earlier batch, while this one was on its way
            return self.replaced[i]
        bad = {i: reason}
        decoder = Decoder(int(self.beton.records[:, 1].max()))
        for j in itertools.chain(range(i + 1, len(self.beton)), range(i)):
            found = self.replaced.get(j, j)
            shape = (1, self.beton.height[found], self.beton.width[found], 3)
            _, reason = self.beton.try_decode(np.array([found]), np.empty(shape, np.uint8), decoder)
            if not reason:
                break
            bad[j] = reason
        else:
            raise CorruptRecord(f"{self.beton.path}: no record can be decoded")
        name = printable(self.beton.name(found))
        for k, why in bad.items():
            self.replaced[k] = found
            error = self.beton.corrupt(k, why)
            print(f"warning: {error}; {name} takes its place", file=sys.stderr, flush=True)
        return found

    def _canvas(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        size = int(np.prod(shape))
        if self._ring[slot].numel() < size:
            self._ring[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
        return self._ring[slot][:size].view(shape)


class ViewLoader:
    """Batches of paired views of a beton's images, for one rank of a distributed run.

    `batch_size` counts the images of one optimiser step over all ranks and micro-batches; each
    yielded batch holds batch_size / (world · accumulation) of them, and `accumulation` batches make
    a step. The last, partial step of an epoch is dropped, so all ranks see equally many. `threads`
    decode. `on_corrupt` says what becomes of a record that cannot be decoded: see CanvasLoader. A
    batch's index and views are those of the image that is on it.

    Raises UserError if the batch cannot be shared out, if the set is smaller than one, or if its
    canvases would not fit in memory.
    """

    def __init__(
        self,
        beton: Beton,
        views: ViewConfig,
        batch_size: int,
        *,
        seed: int,
        backend: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        threads: int = 1,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        if batch_size % (world * accumulation):
            raise UserError(
                f"a batch of {batch_size} images cannot be shared equally by {world} processes"
                f" x {accumulation} micro-batches"
            )
        if batch_size > len(beton):
            raise UserError(
                f"{beton.path}: {len(beton)} images are fewer than one batch of {batch_size}"
            )
        self.beton, self.views, self.batch_size, self.seed = beton, views, batch_size, seed
        self.device, self.dtype = device, dtype
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.steps_per_epoch = len(beton) // batch_size
        self._backend = get_backend(backend)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._check_memory()
        self._canvases = CanvasLoader(beton, threads, device.type == "cuda", on_corrupt)

    @property
    def replaced(self) -> dict[int, int]:
        """Records met so far, on this rank, that cannot be decoded, and what stands in for each."""
        return self._canvases.replaced

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of `epoch`, from step `start` of it on: `accumulation` for each
        step.
        """
        shares = self.shares(epoch)[start * self.accumulation :]
        for which, canvas in self._canvases.decode(list(shares)):
            batch, copied = self._view(epoch, which, canvas)
            yield batch
            if copied is not None:  # only then may the canvas be written again
                copied.synchronize()

    def shares(self, epoch: int) -> np.ndarray:
        """Which records this rank takes: int64 [steps · accumulation, images of a micro-batch].

        The shuffled set is cut into steps first and into micro-batches and ranks after, so a step
        holds the same images however many processes share it.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = generator.permutation(len(self.beton))[: self.steps_per_epoch * self.batch_size]
        return order.reshape(self.steps_per_epoch * self.accumulation, self.world, -1)[:, self.rank]

    def _view(
        self, epoch: int, which: np.ndarray, canvas: Tensor
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch of a canvas, and what tells that the canvas has left host memory."""
        height, width = self.beton.height[which], self.beton.width[which]
        index = self.beton.index[which]
        params = sample_views(self.seed, epoch, index, height, width, self.views)
        sizes = torch.from_numpy(np.stack([height, width], axis=1))
        host = (canvas, *map(torch.from_numpy, (params.overlap, params.flipped, index)))
        (on_device, *geometry), copied = self._copy(host)
        views = self._backend(on_device, sizes, params, self.views.size, self.device, self.dtype)
        return Batch(views, *geometry), copied

    def _copy(self, host: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Copy to the device on a stream of its own: a copy need not wait for the running step."""
        if self._stream is None:
            return [tensor.to(self.device) for tensor in host], None
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in host]
            copied = self._stream.record_event()
        compute.wait_event(copied)
        for tensor in copies:
            tensor.record_stream(compute)
        return copies, copied

    def _check_memory(self) -> None:
        images = self.batch_size // (self.world * self.accumulation)
        height, width = self.beton.height.max(), self.beton.width.max()
        worst = int(images * height * width * 3 * (_AHEAD + 1))
        free = psutil.virtual_memory().available
        if worst > free:
            raise UserError(
                f"{self.beton.path}: canvases of {images} images of up to {height}x{width} pixels"
                f" may need {worst / 1e9:.1f} GB and {free / 1e9:.1f} GB are free:"
                " pack with --max-side, or take smaller batches"
            )
