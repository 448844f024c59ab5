"""Decodes records on threads: into canvases that hold whole images, into crops, or into views."""

import itertools
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.compiled import Plan, as_array
from pipeline.beton import Beton
from pipeline.choices import OnCorrupt
from pipeline.ffcv_format import JPEG
from pipeline.resize import resize
from pipeline.source import EPOCH_HAS_ENDED, Replacements, draw
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig

_AHEAD = 2  # batches that are decoded while one is consumed
_SLICES_PER_THREAD = 4  # small enough that threads finish together, large enough to amortise a call

_Bad = dict[int, str]  # position in the batch: why this image cannot be decoded
_Slice = tuple[int, Future[_Bad]]  # first position of a slice of a batch, and its decoding
_Pending = deque[tuple[np.ndarray, Tensor, list[_Slice]]]  # records, pixels, slices of each batch


class RecordLoader(ABC):
    """Decodes lists of records into batches of pixels, on `threads` threads, a few batches ahead.

    The pixels are in a small ring of buffers, pinned if `pin` is set. Buffers are reused and grow
    to the largest batch so far. A subclass defines the shape of the pixels and writes them; it may
    also choose their type, and let the receiver `keep` a batch: its memory is then left alone.

    A record that cannot be decoded ends the iteration (`on_corrupt` "stop") or is replaced, see
    `pipeline.source.Replacements`.
    """

    dtype = torch.uint8
    keep = False

    def __init__(
        self,
        beton: Beton,
        threads: int,
        pin: bool,
        on_corrupt: OnCorrupt = "stop",
        max_replaced: float = 1.0,
    ) -> None:
        self.beton = beton
        self.threads = threads
        self.pin = pin
        self.on_corrupt = on_corrupt
        self.replacements = Replacements(beton, max_replaced)
        self._thread = threading.local()  # each thread's decoder and memory to work in
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._ring = [torch.empty(0, dtype=self.dtype) for _ in range(_AHEAD + 1)]
        self._kept: list[np.ndarray] = []  # in place of the ring, if batches may be kept
        self._pending: _Pending = deque()  # the batches that are being decoded

    @abstractmethod
    def worst_case(self, images: int) -> int:
        """Bytes that batches of `images` images may need."""

    @abstractmethod
    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        """The shape of the pixels of these records."""

    @abstractmethod
    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        """Write records `which` to a batch's `pixels`, from position `begin` on, until one fails.

        Returns the failed record's position in `which` and the reason, or (-1, "").
        """

    def decode(
        self, batches: Sequence[np.ndarray], epoch: int = 0
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (which int64 [B], pixels) for each of `batches`, in order.

        Pixels are valid until the next batch is requested, unless `keep`. `which` holds the decoded
        records; they differ from the requested records if one was replaced.

        Raises CorruptRecord, or the exception of a thread, when the iteration reaches the batch;
        RuntimeError after a later call of `decode`, which uses the same buffers.
        """
        _settle(self._pending)
        pending = self._pending = deque()
        try:
            for step in range(len(batches) + _AHEAD):
                if step < len(batches):
                    pending.append(self._submit(epoch, batches[step], step % len(self._ring)))
                if step >= _AHEAD:
                    which, pixels, slices = pending[0]
                    bad = {
                        begin + b: reason
                        for begin, decoding in slices
                        for b, reason in decoding.result().items()
                    }
                    yield self._replace(epoch, which, pixels, bad) if bad else (which, pixels)
                    if self._pending is not pending:
                        raise RuntimeError(EPOCH_HAS_ENDED)
                    pending.popleft()
        finally:
            _settle(pending)

    def _submit(
        self, epoch: int, which: np.ndarray, slot: int
    ) -> tuple[np.ndarray, Tensor, list[_Slice]]:
        """Start to decode a batch into buffer `slot` of the ring."""
        which = self.replacements.apply(which)
        pixels = self._buffer(slot, self._shape(epoch, which))
        parts = np.array_split(which, min(len(which), self.threads * _SLICES_PER_THREAD))
        begins = itertools.accumulate((len(part) for part in parts), initial=0)
        slices = [
            (begin, self._pool.submit(self._write_slice, epoch, part, [as_array(pixels)], begin))
            for begin, part in zip(begins, parts, strict=False)
        ]
        return which, pixels, slices

    def _write_slice(
        self, epoch: int, which: np.ndarray, lent: list[np.ndarray], begin: int
    ) -> _Bad:
        # Popped, because a pool's thread holds its arguments for a moment after its result is
        # known: the memory would not be free when the next batch needs one.
        pixels = lent.pop()
        bad: _Bad = {}
        done = 0
        while done < len(which):
            failed, reason = self._write(epoch, which[done:], pixels, begin + done)
            if not reason:
                break
            if self.on_corrupt == "stop":
                raise self.beton.corrupt(int(which[done + failed]), reason)
            bad[done + failed] = reason
            done += failed + 1
        return bad

    def _replace(
        self, epoch: int, which: np.ndarray, pixels: Tensor, bad: _Bad
    ) -> tuple[np.ndarray, Tensor]:
        """The batch with its bad images replaced, in a larger buffer if a replacement needs it."""
        which = which.copy()
        for b, reason in bad.items():
            which[b] = self.replacements.find(int(which[b]), reason)
        shape = tuple(map(max, self._shape(epoch, which), pixels.shape))
        if shape != pixels.shape:
            small = pixels
            pixels = torch.empty(shape, dtype=self.dtype, pin_memory=self.pin)
            pixels[tuple(map(slice, small.shape))] = small
        for b in bad:
            _, reason = self._write(epoch, which[b : b + 1], as_array(pixels), b)
            if reason:
                raise self.beton.corrupt(int(which[b]), reason)
        return which, pixels

    def _decoder(self) -> Decoder:
        """The decoder of the calling thread."""
        if not hasattr(self._thread, "decoder"):
            self._thread.decoder = Decoder(int(self.beton.records[:, 1].max()))
        decoder: Decoder = self._thread.decoder
        return decoder

    def _held(self, size: int) -> int:
        """Bytes that a buffer takes: PyTorch rounds pinned ones up to a power of two."""
        return 1 << (size - 1).bit_length() if self.pin else size

    def _buffer(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self.keep:
            return torch.from_numpy(self._free_memory(size)).view(self.dtype).view(shape)
        if self._ring[slot].numel() < size:
            self._ring[slot] = torch.empty(size, dtype=self.dtype, pin_memory=self.pin)
        return self._ring[slot][:size].view(shape)

    def _free_memory(self, values: int) -> np.ndarray:
        """Memory for a batch that its receiver may keep: that of a batch which nobody holds any
        more, or new one, because new pages cost the kernel time. NumPy asks it for large ones.
        """
        size = values * self.dtype.itemsize
        for i in range(len(self._kept)):
            if self._kept[i].size >= size and _holders(self._kept, i) == _NOBODY:
                return self._kept[i][:size]
        memory = np.empty(size, np.uint8)
        self._kept = [memory, *self._kept][: _AHEAD + 2]
        return memory


def _holders(memories: list[np.ndarray], i: int) -> int:
    """How many references there are to a memory; a tensor of it, or a part of one, holds one."""
    return sys.getrefcount(memories[i])


_NOBODY = _holders([np.empty(0, np.uint8)], 0)


def _settle(pending: _Pending) -> None:
    """After an early end: wait until no thread writes to the ring any more."""
    for _, _, slices in pending:
        for _, decoding in slices:
            if not decoding.cancel():
                decoding.exception()


class CanvasLoader(RecordLoader):
    """Whole images: pixels [B, Hmax, Wmax, 3], image b in the top left corner of its canvas."""

    def worst_case(self, images: int) -> int:
        largest = images * int(self.beton.height.max() * self.beton.width.max()) * 3
        return (_AHEAD + 1) * self._held(largest)

    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        height, width = self.beton.height[which].max(), self.beton.width[which].max()
        return len(which), int(height), int(width), 3

    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        return self.beton.try_decode(which, pixels[begin:], self._decoder())


class CropLoader(RecordLoader):
    """Both crops of each image, resized and flipped by the parameters that `sample_views` draws:
    pixels [2, B, S, S, 3]. The thread that decoded an image, into a canvas of its own, crops it.

    With `colours`, a type of floats, the thread also colours and normalises both views, while they
    are in its cache: the whole of an image's way. Without a GPU, these batches may be kept.

    A JPEG whose two crops are both much larger than a view is decoded at 1/2, 1/4 or 1/8 of its
    size (libjpeg's scaled inverse DCT). For photographs of 7 and 12 megapixels and views of 224
    this gives 1.2 times the throughput. The PSNR against views from the whole image is 53 dB (44 dB
    in the worst case seen: lines 5 pixels apart). Crops keep their exact position, in fractions of
    a pixel.
    """

    def __init__(
        self,
        beton: Beton,
        threads: int,
        pin: bool,
        on_corrupt: OnCorrupt = "stop",
        max_replaced: float = 1.0,
        *,
        views: ViewConfig,
        seed: int,
        views_of: Callable[[int], ViewConfig],
        colours: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.colours = colours or torch.uint8, colours
        self.keep = colours is not None and not pin
        super().__init__(beton, threads, pin, on_corrupt, max_replaced)
        self.views, self.seed, self.views_of = views, seed, views_of

    def worst_case(self, images: int) -> int:
        side, height, width = self.views.size, self.beton.height, self.beton.width
        canvas = int((height * width).max()) * 3
        resized = int(height.max() + 4 * side) * 3 * side + 96 * int(width.max())
        batch = images * 2 * side**2 * 3 * self.dtype.itemsize
        batches = _AHEAD + 1 + self.keep  # the last one is with its receiver
        return batches * self._held(batch) + self.threads * (canvas + resized)

    def _shape(self, epoch: int, which: np.ndarray) -> tuple[int, ...]:
        side = self.views_of(epoch).size
        return 2, len(which), side, side, 3

    def _write(
        self, epoch: int, which: np.ndarray, pixels: np.ndarray, begin: int
    ) -> tuple[int, str]:
        params = draw(self.beton, self.seed, epoch, which, self.views_of(epoch).unmasked())
        plan = Plan(params, self.colours) if self.colours else None
        for b, i in enumerate(which):
            boxes = params.crops[:, b]
            scale = _scale(boxes, pixels.shape[2]) if self.beton.records[i, 4] == JPEG else 1
            shape = -(-self.beton.height[i] // scale), -(-self.beton.width[i] // scale), 3
            image = self._memory("canvas", shape)
            reason = self.beton.try_crops(i, image, boxes, self._decoder(), scale)
            if reason:
                return b, reason
            for v in range(2):
                out = pixels[v, begin + b]
                crop = self._memory("crop", out.shape) if plan else out
                resize(image, boxes[v] / scale, bool(params.flipped[v, b]), crop)
                if plan:
                    planes = self._memory("planes", (3, crop.size // 3))
                    plan.paint(v, b, crop, planes, out)
        return -1, ""

    def _memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Memory of the calling thread, uint8 of this shape, with the last image's values."""
        size = math.prod(map(int, shape))
        memory: np.ndarray | None = getattr(self._thread, name, None)
        if memory is None or memory.size < size:
            memory = np.empty(size, np.uint8)
            setattr(self._thread, name, memory)
        return memory[:size].reshape(shape)


def _scale(boxes: np.ndarray, side: int) -> int:
    """The largest scale of 1, 2, 4 and 8 at which both crops [2, 4] are still at least four times
    as large as a view's `side`.

    With two times instead of four, patterns as fine as the decoder's filter look different.
    """
    smallest = int((boxes[:, 2:] - boxes[:, :2]).min())
    return next((s for s in (8, 4, 2) if smallest >= 4 * s * side), 1)
