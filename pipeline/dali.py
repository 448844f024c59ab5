"""DALI as a source of batches: it decodes and cuts both crops, then a backend colours them.

DALI gets only the records' bytes and the drawn geometry. So a batch holds the same images,
parameters and boxes as a batch of `pipeline.loader.ViewLoader`, and pixels that differ by rounding.
With a GPU, DALI decodes there (nvJPEG); otherwise it uses its CPU operators.

DALI decodes a damaged JPEG without an error as long as its headers and its end are intact. So each
record is checked when it is first read: its checksum must be the one in the manifest, or, without a
manifest, libjpeg-turbo must decode it. DALI gets its bytes only after this check. Of a JPEG without
all its parts, which decoders complete in different ways, it gets libjpeg-turbo's pixels.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from zlib_ng.zlib_ng import crc32

from pipeline.augment import get_backend
from pipeline.beton import Beton, CorruptRecord
from pipeline.errors import UserError
from pipeline.ffcv_format import JPEG, RAW
from pipeline.jpeg_parts import missing_parts
from pipeline.source import (
    EPOCH_HAS_ENDED,
    Batch,
    BatchSource,
    Replacements,
    beside_views,
    draw,
)
from pipeline.turbojpeg import REASONS, SHORT_READ, Decoder
from pipeline.views import ViewConfig, ViewParams

_READ_AHEAD = 2  # batches whose bytes are read before DALI requests them
_DECODE_AHEAD = 2  # batches that DALI decodes while one is consumed

_DALI_ERRORS = (RuntimeError, ValueError, IndexError)  # of DALI's C++ exceptions in Python

# A forked child has none of DALI's threads. If it garbage-collected a pipeline, it would hang or
# crash, so it keeps every pipeline alive.
_built: WeakSet[Any] = WeakSet()
_inherited: list[list[Any]] = []  # filled before the fork: a child may collect at once
os.register_at_fork(before=lambda: _inherited.append(list(_built)), after_in_parent=_inherited.pop)

_File = NDArray[np.uint8]  # the bytes of an image file, which DALI decodes
_Read = list[tuple[_File, str]]  # files, each with the reason why DALI must not get it, or ""


class DaliLoader(BatchSource):
    """Batches of paired views, decoded and cropped by DALI; arguments, order and content are those
    of `pipeline.loader.ViewLoader`.

    DALI uses `threads` threads, and as many others read. JPEGs are decoded with the exact DCT and
    smooth chroma, as PIL does it. Records of raw pixels get a PPM header, so that DALI decodes them
    like any other file.

    Raises UserError as BatchSource does, or if DALI is not installed.
    """

    def __init__(
        self, beton: Beton, views: ViewConfig, batch_size: int, *, backend: str, **options: Any
    ) -> None:
        super().__init__(beton, views, batch_size, **options)
        self._colour = get_backend(backend).colour
        self._replacements = Replacements(beton, self.max_replaced)
        self.replaced = self._replacements.known
        self._checked = np.zeros(len(beton), np.bool_)
        self._incomplete = np.zeros(len(beton), np.bool_)  # JPEGs, see pipeline.jpeg_parts
        self._pool = ThreadPoolExecutor(self.threads, "read")
        self._pipe: Any = None  # DALI's Pipeline, or None once it has failed
        self._build(self.views_of(0).size)

    def _batches(self, epoch: int, shares: NDArray[np.int64]) -> Iterator[Batch]:
        done = 0
        while done < len(shares):
            try:
                for batch in self._run(epoch, shares[done:]):
                    done += 1
                    yield batch
            except _DaliError as error:
                self._replace_faulty(error)

    # ---- DALI's side ----

    def _build(self, side: int) -> None:
        """Build DALI's pipeline for views of this side."""
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as error:
            raise UserError(
                f"data.crops=dali needs NVIDIA DALI ({error}): pip install slotstream[dali]"
            ) from None
        on_gpu = self.device.type == "cuda"
        self._feed, self._side = _Feed(), side
        self._pipe = Pipeline(
            batch_size=self.images_per_batch,
            num_threads=self.threads,
            device_id=torch.empty(0, device=self.device).device.index if on_gpu else None,
            prefetch_queue_depth=_DECODE_AHEAD,
        )
        with self._pipe:
            files, *geometry = fn.external_source(
                source=self._feed,
                num_outputs=5,
                dtype=[types.UINT8, *[types.INT32] * 4],
                ndim=[1, 1, 1, 0, 0],
                no_copy=True,  # the feed keeps the arrays until their batch has been consumed
            )
            images = fn.decoders.image(
                files,
                device="mixed" if on_gpu else "cpu",
                adjust_orientation=False,
                use_fast_idct=False,
                jpeg_fancy_upsampling=True,
                affine=False,  # else all processes of a machine pin their threads to the same core
            )
            views = []
            for crop, flipped in zip(geometry[:2], geometry[2:], strict=True):
                # Crop first: the filter of the resize must not see pixels outside the crop.
                view = fn.slice(images, start=crop[:2], end=crop[2:], axes=(1, 0))
                view = fn.resize(
                    view, size=(side, side), interp_type=types.INTERP_CUBIC, antialias=True
                )
                views.append(fn.flip(view, horizontal=flipped))
            self._pipe.set_outputs(*views)
        self._pipe.build()
        _built.add(self._pipe)

    def _run(self, epoch: int, shares: NDArray[np.int64]) -> Iterator[Batch]:
        """Run DALI over `shares`. Raises _DaliError and CorruptRecord."""
        self._rewind()
        side = self.views_of(epoch).size
        if self._pipe is None or side != self._side:
            self._build(side)
        jobs = self._feed.jobs = self._jobs(epoch, shares)
        try:
            self._call("schedule_run")  # the first call of an epoch starts _DECODE_AHEAD batches
            while self._feed.pending:
                pixels = self._take()
                job = self._feed.pending.popleft()
                self._call("schedule_run")
                views = self._colour(pixels, job.params, self.device, self.dtype)
                beside = beside_views(self.beton, job.which, job.params)
                yield Batch(views, *map(self._to_device, beside))
                if self._feed.jobs is not jobs:
                    raise RuntimeError(EPOCH_HAS_ENDED)
            if self._feed.error is not None:
                raise self._feed.error
        finally:
            if self._feed.jobs is jobs:
                self._rewind()

    def _take(self) -> Tensor:
        """A copy of the next finished batch, uint8 [2, B, S, S, 3]: DALI reuses its memory."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        outputs = self._call("share_outputs", stream)
        pixels = torch.stack([from_dlpack(view.as_tensor()) for view in outputs])
        self._pipe.release_outputs()
        return pixels

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the pipeline, and drop it if it fails. The new exception holds only the error's
        text: the old traceback would keep the pipeline alive.
        """
        try:
            return getattr(self._pipe, method)(*arguments)
        except _DALI_ERRORS as error:
            message = " ".join(str(error).split())
        self._pipe = None
        raise _DaliError(list(self._feed.pending), message)

    def _rewind(self) -> None:
        """Let DALI finish the batches it has started, and prepare it for another epoch."""
        self._feed.stop()
        if self._pipe is None:
            return
        try:
            while not self._pipe.empty():
                self._pipe.share_outputs()
                self._pipe.release_outputs()
            self._pipe.schedule_run()  # reaches the end of the feed, as reset() requires
            self._pipe.reset()
        except _DALI_ERRORS:
            self._pipe = None

    def _replace_faulty(self, failure: "_DaliError") -> None:
        """Replace the records on which DALI failed although they passed their check.

        Raises CorruptRecord unless `on_corrupt` is "replace", and UserError if no record is bad.
        """
        suspects = list(dict.fromkeys(i for job in failure.jobs for i in job.which.tolist()))
        faults = list(self._pool.map(self._fault, suspects))
        if not any(faults):
            raise UserError(
                f"{self.beton.path}: DALI failed on images that libjpeg-turbo can decode"
                f" (data.crops=device does): {failure}"
            )
        for i, reason in zip(suspects, faults, strict=True):
            if reason:
                self._replacement(i, reason)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    # ---- The records' side ----

    def _jobs(self, epoch: int, shares: NDArray[np.int64]) -> Iterator["_Job"]:
        """DALI's job for each row of `shares`. Raises CorruptRecord at a row with a bad record,
        unless the record is replaced.
        """
        reading: deque[tuple[list[int], list[Future[_Read]]]] = deque()
        for step in range(len(shares) + _READ_AHEAD):
            if step < len(shares):
                which = self._replacements.apply(shares[step]).tolist()
                slices = [which[t :: self.threads] for t in range(self.threads)]
                reading.append((which, [self._pool.submit(self._read_all, s) for s in slices]))
            if step >= _READ_AHEAD:
                yield self._job(epoch, *reading.popleft())

    def _job(self, epoch: int, which: list[int], parts: list[Future[_Read]]) -> "_Job":
        files: list[_File] = [np.empty(0, np.uint8)] * len(which)
        for t, part in enumerate(parts):
            for b, (file, reason) in enumerate(part.result()):
                position = t + b * self.threads
                files[position] = file
                if reason:
                    which[position] = self._replacement(which[position], reason)
                    files[position], _ = self._read(which[position])
        rows = np.array(which)
        params = draw(self.beton, self.seed, epoch, rows, self.views_of(epoch))
        return _Job(rows, params, (files, *params.crops, *params.flipped.astype(np.int32)))

    def _read_all(self, which: list[int]) -> _Read:
        return [self._read(i) for i in which]

    def _read(self, i: int) -> tuple[_File, str]:
        """Record `i` as a file for DALI, and the reason why DALI must not get it, or ""."""
        pointer, size, height, width, mode = self.beton.records[i].tolist()
        header = _ppm(height, width) if mode == RAW else b""
        file = np.empty(len(header) + size, np.uint8)
        file[: len(header)] = np.frombuffer(header, np.uint8)
        data = file.data[len(header) :]
        try:
            if os.preadv(self.beton.file, [data], pointer) != size:
                return file, REASONS[SHORT_READ]
        except OSError as error:
            return file, str(error)
        if not self._checked[i]:
            self._incomplete[i] = mode == JPEG and missing_parts(file)
            known = not self._incomplete[i] and crc32(data) == self.beton.checksums[i]
            if reason := "" if known else self._fault(i):
                return file, reason
            self._checked[i] = True
        return (self._decoded(i) if self._incomplete[i] else file), ""

    def _decoded(self, i: int) -> _File:
        """Record `i` as libjpeg-turbo decodes it, as a PPM."""
        pixels = self.beton.decode(i)
        header = _ppm(*pixels.shape[:2])
        return np.concatenate([np.frombuffer(header, np.uint8), pixels.reshape(-1)])

    def _fault(self, i: int) -> str:
        """The reason why libjpeg-turbo cannot decode record `i`, or ""."""
        canvas = np.empty((1, self.beton.height[i], self.beton.width[i], 3), np.uint8)
        decoder = Decoder(int(self.beton.records[i, 1]))
        return self.beton.try_decode(np.array([i]), canvas, decoder)[1]

    def _replacement(self, i: int, reason: str) -> int:
        """The replacement of record `i`. Raises CorruptRecord if `on_corrupt` is "stop"."""
        if self.on_corrupt == "stop":
            raise self.beton.corrupt(i, reason)
        return self._replacements.find(i, reason)


def _ppm(height: int, width: int) -> bytes:
    """The header of a PPM, which raw RGB follows."""
    return b"P6 %d %d 255\n" % (width, height)


class _Job(NamedTuple):
    """DALI's inputs for one batch."""

    which: NDArray[np.int64]
    """[B] records"""
    params: ViewParams
    inputs: tuple[Any, ...]
    """Files; crops int32 [B, 4] of view 1, of view 2; flips int32 [B] of view 1, of view 2."""


class _Feed:
    """DALI calls it for its next batch, and keeps it alive. So it holds no reference to the loader,
    which can be freed.
    """

    def __init__(self) -> None:
        self.pending: deque[_Job] = deque()
        """Jobs that DALI has taken and whose batches have not been consumed."""
        self.error: CorruptRecord | None = None
        """Why the jobs ended early; raised when all earlier batches have been consumed."""
        self.jobs: Iterator[_Job] = iter(())
        """Future jobs."""

    def stop(self) -> None:
        self.pending.clear()
        self.error, self.jobs = None, iter(())

    def __call__(self) -> tuple[Any, ...]:
        try:
            job = next(self.jobs)
        except CorruptRecord as error:
            self.error = error
            raise StopIteration from None
        self.pending.append(job)
        return job.inputs


class _DaliError(Exception):
    """DALI has failed on one of `jobs`."""

    def __init__(self, jobs: list[_Job], message: str) -> None:
        super().__init__(message)
        self.jobs = jobs
