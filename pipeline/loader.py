"""From a beton to the batches that the model sees: read, decode once, cut both crops, colour."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.augment import get_backend
from pipeline.beton import Beton
from pipeline.choices import AnyCrops, Crops
from pipeline.dali import DaliLoader
from pipeline.decode import CanvasLoader, CropLoader, RecordLoader
from pipeline.errors import UserError
from pipeline.image_folder import ImageFolder
from pipeline.source import Batch, BatchSource, beside_views, draw
from pipeline.views import ViewConfig


def choose(backend: str, crops: AnyCrops, device: torch.device) -> tuple[str, Crops]:
    """What "auto" means on this device: see `train.config.DataConfig`."""
    on_gpu = device.type == "cuda"
    if backend == "auto":
        backend = "triton" if on_gpu else "compiled"
    if crops == "auto":
        crops = "device" if on_gpu and backend != "compiled" else "host"
    return backend, crops


def make_loader(
    beton: Beton,
    views: ViewConfig,
    batch_size: int,
    *,
    crops: AnyCrops,
    backend: str,
    device: torch.device,
    **options: Any,
) -> BatchSource:
    """The source of batches for these settings. `options` are the other arguments of ViewLoader.

    Raises UserError for a setting that cannot work on this device, or as ViewLoader does.
    """
    backend, crops = choose(backend, crops, device)
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and device.type != "cuda" and not interpreting:
        raise UserError(f"data.backend: triton needs a GPU, and this run is on the {device.type}")
    if crops == "dali":
        if isinstance(beton, ImageFolder):
            raise UserError(f"data.crops: dali reads betons, and {beton.path} is a folder: pack it")
        return DaliLoader(beton, views, batch_size, backend=backend, device=device, **options)
    return ViewLoader(
        beton, views, batch_size, crops=crops, backend=backend, device=device, **options
    )


class ViewLoader(BatchSource):
    """Batches that libjpeg-turbo decodes. With `crops` "host" the decoding threads also cut both
    crops, and with `backend` "compiled" they finish both views; with "device" the backend crops.
    `options` are those of BatchSource.

    Raises UserError as BatchSource does, or if the pixels of the batches would not fit in memory.
    """

    def __init__(
        self,
        beton: Beton,
        views: ViewConfig,
        batch_size: int,
        *,
        backend: str,
        crops: Literal["device", "host"] = "device",
        **options: Any,
    ) -> None:
        super().__init__(beton, views, batch_size, **options)
        self._backend = get_backend(backend)
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        arguments = (beton, self.threads, on_gpu, self.on_corrupt, self.max_replaced)
        self._finished = crops == "host" and backend == "compiled"
        self._records: RecordLoader = (
            CropLoader(
                *arguments,
                views=views,
                seed=self.seed,
                views_of=self.views_of,
                colours=self.dtype if self._finished else None,
            )
            if crops == "host"
            else CanvasLoader(*arguments)
        )
        self.replaced = self._records.replacements.known
        self._copied: torch.cuda.Event | None = None  # the last batch has left host memory
        self._check_memory()

    def _batches(self, epoch: int, shares: np.ndarray) -> Iterator[Batch]:
        self._wait_for_copy()
        for which, pixels in self._records.decode(list(shares), epoch):
            batch, self._copied = self._view(epoch, which, pixels)
            yield batch
            self._wait_for_copy()

    def _view(
        self, epoch: int, which: np.ndarray, pixels: Tensor
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch of decoded records, and the event after which their pixels may change."""
        drawn = self.views_of(epoch)
        params = draw(self.beton, self.seed, epoch, which, drawn)
        host = (pixels, *map(torch.from_numpy, beside_views(self.beton, which, params)))
        (on_device, *beside), copied = self._copy(host)
        if self._finished:
            views = on_device.permute(0, 1, 4, 2, 3)
        elif isinstance(self._records, CropLoader):
            views = self._backend.colour(on_device, params, self.device, self.dtype)
        else:
            sizes = torch.from_numpy(self.beton.records[which, 2:4])
            views = self._backend.apply(
                on_device, sizes, params, drawn.size, self.device, self.dtype
            )
        return Batch(views, *beside), copied

    def _copy(self, host: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Copy to the device on a separate stream, so that the copy does not wait for the running
        training step.
        """
        if self._stream is None:
            return [tensor.to(self.device) for tensor in host], None
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            # From other memory than pinned one the host would wait for the pixels before it.
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in host]
            copied = self._stream.record_event()
        compute.wait_event(copied)
        for tensor in copies:
            tensor.record_stream(compute)
        return copies, copied

    def _wait_for_copy(self) -> None:
        """Wait until the last batch is on the device: the decoding threads may then overwrite it in
        host memory.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _check_memory(self) -> None:
        images = self.images_per_batch
        worst, free = self._records.worst_case(images), psutil.virtual_memory().available
        if worst > free:
            height, width = self.beton.height.max(), self.beton.width.max()
            raise UserError(
                f"{self.beton.path}: batches of {images} images of up to {height}x{width} pixels"
                f" may need {worst / 1e9:.1f} GB and {free / 1e9:.1f} GB are free:"
                " pack with --max-side, or take smaller batches"
            )
