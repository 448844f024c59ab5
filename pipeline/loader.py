"""From a beton to the batches that the model sees: read, decode once, crop on the device.

A loader has no state between epochs: which images a step holds, in which order, and their views
follow from (seed, epoch, step, rank) alone, so a run resumes in mid-epoch without decoding what it
skips.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.augment import get_backend
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig, sample_views

_AHEAD = 2  # batches being decoded while one is consumed
_SLICES_PER_THREAD = 4  # small enough that threads finish together, large enough to amortise a call


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
    """

    def __init__(self, beton: Beton, threads: int, pin: bool) -> None:
        self.beton = beton
        self.threads = threads
        self.pin = pin
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=self._start_thread)
        self._ring = [torch.empty(0, dtype=torch.uint8) for _ in range(_AHEAD + 1)]

    def _start_thread(self) -> None:
        self._own.decoder = Decoder(int(self.beton.records[:, 1].max()))

    def decode(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (which int64 [B], canvas uint8 [B, Hmax, Wmax, 3]) for each of `batches`, in order.

        A canvas holds image b in its top left corner and is valid until the next one is asked for.
        Raises CorruptRecord when the batch with the bad record is reached.
        """
        pending: deque[tuple[np.ndarray, Tensor, list[Future[None]]]] = deque()
        try:
            for step in range(len(batches) + _AHEAD):
                if step < len(batches):
                    pending.append(self._submit(batches[step], step % len(self._ring)))
                if step >= _AHEAD:
                    which, canvas, parts = pending[0]
                    for part in parts:
                        part.result()
                    yield which, canvas
                    pending.popleft()
        finally:  # an early end: no thread may still write when the ring is used again
            for _, _, parts in pending:
                for part in parts:
                    if not part.cancel():
                        part.exception()

    def _submit(
        self, which: np.ndarray, slot: int
    ) -> tuple[np.ndarray, Tensor, list[Future[None]]]:
        shape = (len(which), self.beton.height[which].max(), self.beton.width[which].max(), 3)
        canvas = self._canvas(slot, shape)
        pixels = canvas.numpy()
        slices = np.array_split(
            np.arange(len(which)), min(len(which), self.threads * _SLICES_PER_THREAD)
        )
        parts = [
            self._pool.submit(self._decode_slice, which[s[0] : s[-1] + 1], pixels[s[0] : s[-1] + 1])
            for s in slices
        ]
        return which, canvas, parts

    def _decode_slice(self, which: np.ndarray, canvas: np.ndarray) -> None:
        self.beton.decode_into(which, canvas, self._own.decoder)

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
    decode; 0 means one for each core.

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
        self._canvases = CanvasLoader(beton, threads, pin=device.type == "cuda")

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
