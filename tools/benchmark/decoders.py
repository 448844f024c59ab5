"""Decoders of others, on a GPU if there is one: how fast they are, and how far from libjpeg-turbo.

TorchCodec is left out, because it needs FFmpeg; nvJPEG's decoding of a region too, because both
crops of an image together need most of it.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tools.benchmark.timing import Bench

_Pixels = NDArray[np.uint8]


class Decode(Protocol):
    def __call__(self, keep: bool = False) -> list[_Pixels]:
        """Decode all JPEGs, to the device. With `keep`, returns each one's pixels [H, W, 3]."""
        ...


def usable(bench: Bench, jpegs: Sequence[_Pixels], threads: int) -> dict[str, Decode]:
    """DALI's and torchvision's decoders for `jpegs`, by name; those that are not there are skipped
    with the reason.
    """
    makers: dict[str, Callable[..., Decode]] = {}
    if has_dali(bench, "decode"):
        makers["dali"] = dali
    if bench.device.type == "cuda":
        makers["torchvision"] = torchvision
    else:
        bench.skip("decode by torchvision", "without a GPU it calls libjpeg-turbo")
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make(jpegs, min(bench.batch, len(jpegs)), threads, bench.device)
            found[name]()
        except RuntimeError as error:  # for instance built without nvJPEG
            found.pop(name, None)
            bench.skip(f"decode by {name}", (str(error).splitlines() or [""])[0])
    return found


def has_dali(bench: Bench, stage: str) -> bool:
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if not installed:
        bench.skip(f"{stage} by dali", "NVIDIA DALI is not installed")
    return installed


def dali(jpegs: Sequence[_Pixels], batch: int, threads: int, device: torch.device) -> Decode:
    """DALI's decoder on bytes in memory, with the same DCT; on a GPU nvJPEG.

    One batch at a time: decoding ahead would take its time from the next measurement.
    """
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    batches = [list(jpegs[begin : begin + batch]) for begin in range(0, len(jpegs), batch)]
    stream = (files for _ in iter(int, 1) for files in batches)  # without end
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=torch.empty(0, device=device).device.index if on_gpu else None,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipe:
        pipe.set_outputs(
            fn.decoders.image(
                fn.external_source(source=lambda: next(stream), no_copy=True),
                device="mixed" if on_gpu else "cpu",
                adjust_orientation=False,
                use_fast_idct=False,
                jpeg_fancy_upsampling=True,
                affine=False,
            )
        )
    pipe.build()

    def decode(keep: bool = False) -> list[_Pixels]:
        kept: list[_Pixels] = []
        for _ in batches:
            (images,) = pipe.run()
            if keep:
                kept += [np.array(image) for image in images.as_cpu()]
        if on_gpu:
            torch.cuda.synchronize(device)
        return kept

    return decode


def torchvision(jpegs: Sequence[_Pixels], batch: int, threads: int, device: torch.device) -> Decode:
    """torchvision's decoder on bytes in memory; on a GPU nvJPEG, on a CPU one thread."""
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [torch.from_numpy(jpeg.copy()) for jpeg in jpegs]
    batches = [files[begin : begin + batch] for begin in range(0, len(files), batch)]

    def decode(keep: bool = False) -> list[_Pixels]:
        kept: list[_Pixels] = []
        for some in batches:
            images = decode_jpeg(some, ImageReadMode.RGB, device)
            if keep:
                kept += [image.permute(1, 2, 0).cpu().numpy() for image in images]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return kept

    return decode


def difference(decode: Decode, expected: Iterator[_Pixels]) -> tuple[float, float]:
    """Largest and mean difference from the `expected` pixels, in levels of 255."""
    largest, total, count = 0, 0, 0
    for made, right in zip(decode(keep=True), expected, strict=True):
        apart = np.abs(made.astype(np.int16) - right)
        largest = max(largest, int(apart.max()))
        total, count = total + int(apart.sum(dtype=np.int64)), count + apart.size
    return float(largest), total / count
