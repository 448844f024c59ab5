"""From a beton to the batches that the model sees: read, decode once, cut both crops, colour.

A loader has no state between epochs: which images a step holds, in which order, and their views
follow from (seed, epoch, step, rank) alone, so a run resumes in mid-epoch without decoding what it
skips.
"""

import itertools
import math
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.augment import get_backend
from pipeline.beton import Beton, CorruptRecord
from pipeline.choices import Crops, OnCorrupt, Order
from pipeline.errors import UserError, printable, require
from pipeline.ffcv_format import JPEG
from pipeline.order import block_order, epoch_shares, steps_per_epoch
from pipeline.resize import resize
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig, ViewParams, sample_views

_AHEAD = 2  # batches being decoded while one is consumed
_SLICES_PER_THREAD = 4  # small enough that threads finish together, large enough to amortise a call

EPOCH_HAS_ENDED = "this epoch has ended: another one of its loader has begun"
_Bad = dict[int, str]  # why the images at these places could not be decoded
_Part = tuple[int, Future[_Bad]]  # where a slice of a batch begins, and its decoding
_Pending = deque[tuple[np.ndarray, Tensor, list[_Part]]]  # records, pixels, slices of each batch


@dataclass(frozen=True)
class Batch:
    """What the model sees of B images: two views each, and how the views lie on each other.

    views [2, B, 3, S, S] normalised, channels_last; overlap float32 [2, B, 4], the crops'
    intersection x1 y1 x2 y2 in each view's own (0..1) frame after its flip, not clipped: without a
    common pixel, x2 <= x1 or y2 <= y1; flipped bool [2, B]; index int64 [B], the images' numbers.
    """

    views: Tensor
    overlap: Tensor
    flipped: Tensor
    index: Tensor


class BatchSource(ABC):
    """Batches of paired views of a beton's images, for one rank of a distributed run: which images
    a batch holds, however they are decoded and cropped.

    `batch_size` counts the images of one optimiser step over all ranks and micro-batches; each
    yielded batch holds batch_size / (world · accumulation) of them, and `accumulation` batches make
    a step. The last, partial step of an epoch is dropped, so all ranks see equally many. For
    `order` and `window_bytes` see `pipeline.order`. `size_of` gives the side of an epoch's views,
    where that is not `views.size`.

    Raises UserError if the batch cannot be shared out, or if the set is smaller than one.
    """

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
        size_of: Callable[[int], int] | None = None,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(beton, batch_size, world, accumulation)
        self.beton, self.views, self.batch_size, self.seed = beton, views, batch_size, seed
        self.order, self.window_bytes = order, window_bytes
        self.size_of = size_of or (lambda epoch: views.size)
        self.device, self.dtype = device, dtype
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self._ahead = ReadAhead(beton) if order == "quasi-random" else None

    @property
    @abstractmethod
    def replaced(self) -> dict[int, int]:
        """Records met so far, on this rank, that cannot be decoded, and what stands in for each."""

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of `epoch`, from step `start` of it on: `accumulation` for each
        step. Raises ValueError if the epoch has no such step.
        """

    def shares(self, epoch: int) -> np.ndarray:
        """Which records this rank takes: int64 [steps · accumulation, images of a micro-batch]."""
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

    def _first(self, start: int) -> int:
        """Where step `start` begins, among the batches of an epoch."""
        require(0 <= start <= self.steps_per_epoch, "start", start, "a step of the epoch")
        return start * self.accumulation

    def _begin_reading(self, epoch: int, share: float) -> None:
        """Read ahead from `share` (0..1) of `epoch` on, where the order makes that worth it."""
        if self._ahead:
            blocks, windows = block_order(self.beton, self.seed, epoch, self.window_bytes)
            self._ahead.begin(blocks, windows, share)

    def _has_read(self, share: float) -> None:
        """`share` of the epoch is there."""
        if self._ahead:
            self._ahead.reach(share)


def make_loader(
    beton: Beton,
    views: ViewConfig,
    batch_size: int,
    *,
    crops: Crops,
    backend: str,
    device: torch.device,
    **options: Any,
) -> BatchSource:
    """The source for these settings; `options` are the further ones of ViewLoader. `backend` "auto"
    is triton on a GPU and kornia elsewhere.

    Raises UserError for what cannot work here, or as ViewLoader does.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "kornia"
    if backend == "triton" and device.type != "cuda" and not _interpreting():
        raise UserError(f"data.backend: triton needs a GPU, and this run is on the {device.type}")
    if crops == "dali":
        from pipeline.dali import DaliLoader

        return DaliLoader(beton, views, batch_size, backend=backend, device=device, **options)
    return ViewLoader(
        beton, views, batch_size, crops=crops, backend=backend, device=device, **options
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Replacements:
    """Who stands in for records that cannot be decoded: the next record of the file that can, the
    same one whoever asks and whenever.

    `found` holds those met so far, with what took their place; each is reported once, on stderr.
    """

    def __init__(self, beton: Beton) -> None:
        self.beton = beton
        self.found: dict[int, int] = {}

    def apply(self, which: np.ndarray) -> np.ndarray:
        """`which` with those known to be bad replaced."""
        return np.array([self.found.get(i, i) for i in which.tolist()]) if self.found else which

    def find(self, i: int, reason: str) -> int:
        """What takes the place of record `i`, bad for that reason; after the last record comes the
        first. Raises CorruptRecord if nothing can be decoded.
        """
        if i in self.found:  # by an earlier batch, while this one was on its way
            return self.found[i]
        bad = {i: reason}
        decoder = Decoder(int(self.beton.records[:, 1].max()))
        for j in itertools.chain(range(i + 1, len(self.beton)), range(i)):
            stand_in = self.found.get(j, j)
            shape = (1, self.beton.height[stand_in], self.beton.width[stand_in], 3)
            pixels = np.empty(shape, np.uint8)
            _, reason = self.beton.try_decode(np.array([stand_in]), pixels, decoder)
            if not reason:
                break
            bad[j] = reason
        else:
            raise CorruptRecord(f"{self.beton.path}: no record can be decoded")
        name = printable(self.beton.name(stand_in))
        for k, why in bad.items():
            self.found[k] = stand_in
            error = self.beton.corrupt(k, why)
            print(f"warning: {error}; {name} takes its place", file=sys.stderr, flush=True)
        return stand_in


class RecordLoader(ABC):
    """Decodes lists of records into batches of pixels, on `threads` threads, a few batches ahead.

    The pixels lie in a small ring of (on request pinned) buffers that are reused; they grow to the
    largest batch met. What lies in them, and how it gets there, a subclass says.

    A record that cannot be decoded ends the iteration (`on_corrupt` "stop") or is replaced.
    """

    def __init__(
        self, beton: Beton, threads: int, pin: bool, on_corrupt: OnCorrupt = "stop"
    ) -> None:
        self.beton = beton
        self.threads = threads
        self.pin = pin
        self.on_corrupt = on_corrupt
        self.replacements = Replacements(beton)
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._ring = [torch.empty(0, dtype=torch.uint8) for _ in range(_AHEAD + 1)]
        self._pending: _Pending = deque()  # of the batches that are decoded now

    @property
    def replaced(self) -> dict[int, int]:
        """Records met so far that cannot be decoded, and what stands in for each."""
        return self.replacements.found

    @abstractmethod
    def worst_case(self, images: int) -> int:
        """Bytes that batches of `images` may need."""

    @abstractmethod
    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        """Of the pixels of these records."""

    @abstractmethod
    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        """Put records `which` into a batch's `pixels`, from place `begin` on, up to the first that
        fails: its place in `which` and the reason, or (-1, "").
        """

    def decode(
        self, batches: Sequence[np.ndarray], epoch: int = 0
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (which int64 [B], pixels uint8) for each of `batches`, in order.

        Pixels are valid until the next ones are asked for. `which` names the records that are
        there: not quite those asked for where one was replaced. Raises CorruptRecord, or what else
        went wrong in a thread, when the batch concerned is reached; RuntimeError once there is a
        later `decode`, which has the buffers now.
        """
        _settle(self._pending)
        pending = self._pending = deque()
        try:
            for step in range(len(batches) + _AHEAD):
                if step < len(batches):
                    pending.append(self._submit(epoch, batches[step], step % len(self._ring)))
                if step >= _AHEAD:
                    which, pixels, parts = pending[0]
                    bad = {
                        begin + b: reason
                        for begin, part in parts
                        for b, reason in part.result().items()
                    }
                    yield self._replace(epoch, which, pixels, bad) if bad else (which, pixels)
                    if self._pending is not pending:
                        raise RuntimeError(EPOCH_HAS_ENDED)
                    pending.popleft()
        finally:
            _settle(pending)

    def _submit(
        self, epoch: int, which: np.ndarray, slot: int
    ) -> tuple[np.ndarray, Tensor, list[_Part]]:
        which = self.replacements.apply(which)
        pixels = self._buffer(slot, self._shape(epoch, which))
        slices = np.array_split(which, min(len(which), self.threads * _SLICES_PER_THREAD))
        begins = itertools.accumulate((len(part) for part in slices), initial=0)
        parts = [
            (begin, self._pool.submit(self._write_slice, epoch, part, pixels.numpy(), begin))
            for begin, part in zip(begins, slices, strict=False)
        ]
        return which, pixels, parts

    def _write_slice(self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int) -> _Bad:
        bad: _Bad = {}
        at = 0
        while at < len(which):
            place, reason = self._write(epoch, which[at:], pixels, begin + at)
            if not reason:
                break
            if self.on_corrupt == "stop":
                raise self.beton.corrupt(int(which[at + place]), reason)
            bad[at + place] = reason
            at += place + 1
        return bad

    def _replace(
        self, epoch: int, which: np.ndarray, pixels: Tensor, bad: _Bad
    ) -> tuple[np.ndarray, Tensor]:
        """The batch with another image in each bad place; larger pixels if one needs them."""
        which = which.copy()
        for b, reason in bad.items():
            which[b] = self.replacements.find(int(which[b]), reason)
        shape = tuple(map(max, self._shape(epoch, which), pixels.shape))
        if shape != pixels.shape:
            small = pixels
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)
            pixels[tuple(map(slice, small.shape))] = small
        for b in bad:
            _, reason = self._write(epoch, which[b : b + 1], pixels.numpy(), b)
            if reason:
                raise self.beton.corrupt(int(which[b]), reason)
        return which, pixels

    def _decoder(self) -> Decoder:
        """This thread's."""
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(int(self.beton.records[:, 1].max()))
        decoder: Decoder = self._own.decoder
        return decoder

    def _buffer(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._ring[slot].numel() < size:
            self._ring[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
        return self._ring[slot][:size].view(shape)


def _settle(pending: _Pending) -> None:
    """After an early end: no thread may still write when the ring is used again."""
    for _, _, parts in pending:
        for _, part in parts:
            if not part.cancel():
                part.exception()


class CanvasLoader(RecordLoader):
    """Whole images: pixels [B, Hmax, Wmax, 3], image b in the top left corner of its canvas."""

    def worst_case(self, images: int) -> int:
        return (_AHEAD + 1) * images * int(self.beton.height.max() * self.beton.width.max()) * 3

    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        height, width = self.beton.height[which].max(), self.beton.width[which].max()
        return len(which), int(height), int(width), 3

    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        return self.beton.try_decode(which, pixels[begin:], self._decoder())


class CropLoader(RecordLoader):
    """Both crops of each image, resized and flipped: pixels [2, B, S, S, 3], by the parameters that
    `sample_views` draws. An image is decoded into a canvas that its thread keeps.

    A JPEG of which both crops are much larger than a view is decoded at 1/2, 1/4 or 1/8 of its size
    (libjpeg's scaled inverse DCT): 1.2 times as many photographs of 7 and 12 megapixels a second
    for views of 224, at 53 dB to those from the whole image (lines 5 pixels apart, the worst met:
    44 dB). Crops keep their exact place, as fractions of a pixel.
    """

    def __init__(
        self,
        beton: Beton,
        threads: int,
        pin: bool,
        on_corrupt: OnCorrupt = "stop",
        *,
        views: ViewConfig,
        seed: int,
        size_of: Callable[[int], int],
    ) -> None:
        super().__init__(beton, threads, pin, on_corrupt)
        self.views, self.seed, self.size_of = views, seed, size_of

    def worst_case(self, images: int) -> int:
        largest = int((self.beton.height * self.beton.width).max()) * 3
        return (_AHEAD + 1) * images * 2 * self.views.size**2 * 3 + self.threads * largest

    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        side = self.size_of(epoch)
        return 2, len(which), side, side, 3

    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        params = draw(self.beton, self.seed, epoch, which, self.views)
        for b in range(len(which)):
            one, boxes = which[b : b + 1], params.crops[:, b]
            scale = _scale(boxes, pixels.shape[2]) if self.beton.records[one[0], 4] == JPEG else 1
            image = self._canvas(
                -(-self.beton.height[one[0]] // scale), -(-self.beton.width[one[0]] // scale)
            )
            _, reason = self.beton.try_decode(one, image[None], self._decoder(), scale)
            if reason:
                return b, reason
            for v in range(2):
                out = pixels[v, begin + b]
                resize(image, boxes[v] / scale, bool(params.flipped[v, b]), out)
        return -1, ""

    def _canvas(self, height: int, width: int) -> np.ndarray:
        """This thread's, uint8 [height, width, 3]."""
        size = int(height * width * 3)
        if not hasattr(self._own, "canvas") or self._own.canvas.size < size:
            self._own.canvas = np.empty(size, np.uint8)
        canvas: np.ndarray = self._own.canvas[:size].reshape(height, width, 3)
        return canvas


def _scale(boxes: np.ndarray, side: int) -> int:
    """1, 2, 4 or 8: the largest that leaves both crops [2, 4] at least four times a view's `side`;
    with twice, patterns as fine as the decoder's own filter come out visibly different."""
    smallest = int((boxes[:, 2:] - boxes[:, :2]).min())
    return next((s for s in (8, 4, 2) if smallest >= 4 * s * side), 1)


def draw(beton: Beton, seed: int, epoch: int, which: np.ndarray, views: ViewConfig) -> ViewParams:
    """The view parameters of records `which`."""
    size = (beton.height[which], beton.width[which])
    return sample_views(seed, epoch, beton.index[which], *size, views)


class ReadAhead:
    """Asks the kernel to read the blocks of a quasi-random epoch one window before they are
    needed.
    """

    def __init__(self, beton: Beton) -> None:
        self.beton = beton
        self._pool = ThreadPoolExecutor(1, "read-ahead")  # the kernel lets the caller wait at times
        self._blocks, self._window, self._asked = np.empty(0, np.int64), 0.0, 0

    def begin(self, blocks: np.ndarray, windows: int, share: float) -> None:
        """Start, at `share` (0..1) of an epoch that goes through `blocks` in so many windows."""
        self._blocks, self._window = blocks, len(blocks) / windows
        self._asked = math.floor(math.floor(share * windows) * self._window)
        self.reach(share)

    def reach(self, share: float) -> None:
        """`share` of the epoch has been read: ask for what comes within a window from here."""
        upto = math.ceil(share * len(self._blocks) + self._window)
        if upto > self._asked:
            self._pool.submit(self.beton.advise, self._blocks[self._asked : upto])
            self._asked = upto


class ViewLoader(BatchSource):
    """Batches that `threads` threads decode; with `crops` "host" they also cut both crops, with
    "device" the backend does. `options` are those of BatchSource. `on_corrupt` says what becomes of
    a record that cannot be decoded: see RecordLoader. A batch's index and views are those of the
    image that is on it.

    Raises UserError as BatchSource does, or if the pixels of the batches would not fit in memory.
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
        crops: Literal["device", "host"] = "device",
        threads: int = 1,
        on_corrupt: OnCorrupt = "stop",
        **options: Any,
    ) -> None:
        super().__init__(beton, views, batch_size, seed=seed, device=device, **options)
        self._backend = get_backend(backend)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pin = device.type == "cuda"
        self._records: RecordLoader = (
            CropLoader(
                beton, threads, pin, on_corrupt, views=views, seed=seed, size_of=self.size_of
            )
            if crops == "host"
            else CanvasLoader(beton, threads, pin, on_corrupt)
        )
        self._copied: torch.cuda.Event | None = None  # when the last batch has left host memory
        self._check_memory()

    @property
    def replaced(self) -> dict[int, int]:
        return self._records.replaced

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As in BatchSource. Beginning an epoch ends the one before it."""
        shares = self.shares(epoch)
        first = self._first(start)
        self._begin_reading(epoch, first / len(shares))
        self._wait_for_copy()
        decoded = self._records.decode(list(shares[first:]), epoch)
        for place, (which, pixels) in enumerate(decoded, first + 1):
            batch, self._copied = self._view(epoch, which, pixels)
            self._has_read(place / len(shares))
            yield batch
            self._wait_for_copy()

    def _view(
        self, epoch: int, which: np.ndarray, pixels: Tensor
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch of decoded records, and what tells that their pixels have left host memory."""
        params = draw(self.beton, self.seed, epoch, which, self.views)
        index = self.beton.index[which]
        host = (pixels, *map(torch.from_numpy, (params.overlap, params.flipped, index)))
        (on_device, *geometry), copied = self._copy(host)
        if isinstance(self._records, CropLoader):
            views = self._backend.colour(on_device, params, self.device, self.dtype)
        else:
            sizes = torch.from_numpy(self.beton.records[which, 2:4])
            views = self._backend.apply(
                on_device, sizes, params, self.size_of(epoch), self.device, self.dtype
            )
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

    def _wait_for_copy(self) -> None:
        """Only then may the pixels be written again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _check_memory(self) -> None:
        images = self.batch_size // (self.world * self.accumulation)
        worst, free = self._records.worst_case(images), psutil.virtual_memory().available
        if worst > free:
            height, width = self.beton.height.max(), self.beton.width.max()
            raise UserError(
                f"{self.beton.path}: batches of {images} images of up to {height}x{width} pixels"
                f" may need {worst / 1e9:.1f} GB and {free / 1e9:.1f} GB are free:"
                " pack with --max-side, or take smaller batches"
            )
