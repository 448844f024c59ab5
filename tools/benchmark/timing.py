"""How the benchmark times a stage: the work, the settings, the result."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.views import ViewConfig
from train.config import RunConfig

if TYPE_CHECKING:
    from pipeline.beton import Beton


@dataclass(frozen=True)
class StepDetail:
    """Further figures of a training step."""

    first_s: float
    """Seconds of the first step, which compiles and allocates."""
    peak_bytes: int | None
    """Its peak memory on the GPU, weights included; None without a GPU."""
    parts: dict[str, float] | None = None
    """ms of each part of one step in the profiler, which slows the step down."""
    beside: float | None = None
    """Share that is not the networks' forward and backward."""
    operators: int | None = None
    """ATen operators that no other operator calls."""
    launches: int | None = None
    """Kernels and copies on the GPU."""
    host_waits: int | None = None
    """How often a value is copied to the host. On a GPU the host waits for it; on a CPU these are
    the operators whose result's shape or value the host needs."""
    gflop: float | None = None
    """Of one image in a step: both views, forward and backward, and the teacher's forward."""
    active_pairs: float | None = None
    """Contrasted slots, per image and view."""
    largest_batch: int | None = None
    """The largest batch that fits the GPU, to an eighth."""


@dataclass(frozen=True)
class Result:
    """One measurement: medians over the repeats."""

    stage: str
    backend: str
    images_per_s: float
    slowest: float
    """images/s of the slowest repeat"""
    fastest: float
    ms: float
    """Of a batch."""
    host_ms: float
    """Until the calls for a batch returned; less than `ms` if the device was still working."""
    batch: int
    threads: int
    repeats: int
    bytes_per_s: float | None = None
    """Of the bytes that must move at least; each stage's docstring names them."""
    operation: str | None = None
    """The augmentation operation that was measured alone; or "overlap", a pipeline while training;
    or the setting in which a step differs from the configuration."""
    crops: str | None = None
    """Where a pipeline crops: device, host or dali."""
    ratio: float | None = None
    """Rate divided by that of `ratio_to`, measured by turns in the same run."""
    ratio_to: str | None = None
    wait_share: float | None = None
    """Share of the time in which a training step waited for data."""
    levels: tuple[float, float] | None = None
    """Of a decoder: largest and mean difference from libjpeg-turbo's pixels, in levels of 255."""
    detail: StepDetail | None = None

    @property
    def name(self) -> str:
        """In tables and pictures."""
        operation = "while training" if self.operation == "overlap" else self.operation
        parts = (self.stage, self.backend, self.crops and f"crops {self.crops}", operation)
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Work:
    """A call to time. It handles `images` images, for which `bytes` must move at least."""

    stage: str
    backend: str
    call: Callable[[], object]
    images: float
    batch: int
    threads: int
    bytes: int | None = None
    operation: str | None = None
    crops: str | None = None
    levels: tuple[float, float] | None = None


@dataclass
class Bench:
    """The settings of a benchmark, and its results so far."""

    config: RunConfig
    beton: "Beton | None"
    """None: generated canvases."""
    batch: int
    threads: tuple[int, ...]
    repeats: int
    seconds: float
    """Length of a repeat; at least one call."""
    images: int
    """Most images to read and decode at a time."""
    device: torch.device
    backends: tuple[str, ...]
    also: tuple[str, ...] = ()
    """Variants of the step to measure besides the configuration's settings."""
    largest: bool = False
    """Whether to find the largest batch."""
    results: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    keep: Callable[[], None] = lambda: None
    """Called after each measurement, to write what is known so far."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the views and of autocast, as in training; fp16 needs a GPU."""
        types = {"bf16": torch.bfloat16}
        if self.device.type == "cuda":
            types["fp16"] = torch.float16
        return types.get(self.config.efficiency.precision, torch.float32)

    @property
    def views(self) -> ViewConfig:
        """How views are made: a frozen teacher may see them in another resolution."""
        return self.config.loaded(self.config.views)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def cores(self) -> int:
        """Threads of every stage except decode, which is measured with each of `threads`."""
        return max(self.threads)

    def measure(self, works: Sequence[Work], ratio_to: str | None = None) -> list[Result]:
        """Time alternatives by turns, so that a disturbance slows all of them.

        A ratio is the median of the rounds' ratios to the backend `ratio_to`.
        """
        calls = []
        for work in works:
            self.progress(work)
            work.call()  # compiles, allocates
            once, _ = self._time(work, 1)
            calls.append(max(1, round(self.seconds / once)))
        rounds = [
            [self._time(work, count) for work, count in zip(works, calls, strict=True)]
            for _ in range(self.repeats)
        ]
        rates = [
            [count * work.images / turn[i][0] for turn in rounds]
            for i, (work, count) in enumerate(zip(works, calls, strict=True))
        ]
        base = next((rates[i] for i, work in enumerate(works) if work.backend == ratio_to), None)
        for i, work in enumerate(works):
            result = to_result(work, rates[i], [turn[i][1] / calls[i] for turn in rounds])
            if base is not None and base is not rates[i]:
                ratio = statistics.median(a / b for a, b in zip(rates[i], base, strict=True))
                result = replace(result, ratio=ratio, ratio_to=ratio_to)
            self.results.append(result)
        self.keep()
        return self.results[-len(works) :]

    def skip(self, measurement: str, reason: str) -> None:
        """Record that a measurement is skipped, and print it."""
        self.skipped.append(f"{measurement}: {reason}")
        print(f"skipped {measurement}: {reason}", file=sys.stderr, flush=True)

    def progress(self, work: Work) -> None:
        """Print a line."""
        parts = (work.backend, work.crops and f"crops {work.crops}", work.operation)
        name = ", ".join(part for part in parts if part)
        print(f"{work.stage}: {name}, {work.threads} threads", file=sys.stderr, flush=True)

    def _time(self, work: Work, calls: int) -> tuple[float, float]:
        """Seconds of `calls` calls on the device's clock, and on the host's until the last call
        returned.
        """
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(calls):
                work.call()
            seconds = time.perf_counter() - began
            return seconds, seconds
        torch.cuda.synchronize(self.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        first.record()
        for _ in range(calls):
            work.call()
        last.record()
        host = time.perf_counter() - began
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host

    def sample(self) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
        """A batch on the host: record numbers int64 [B], canvas uint8 [B, Hmax, Wmax, 3], height
        and width int64 [B].
        """
        if self.beton is None:
            return generated(self.batch)
        from pipeline.decode import CanvasLoader

        which = np.random.default_rng(0).permutation(len(self.beton))[: self.batch]
        loader = CanvasLoader(self.beton, self.cores, pin=False)
        canvas = next(canvas.clone() for _, canvas in loader.decode([which]))
        return which, canvas, self.beton.height[which], self.beton.width[which]


def to_result(work: Work, rates: list[float], host_seconds: list[float]) -> Result:
    """From the images/s and the host's seconds a call of each repeat."""
    rate = statistics.median(rates)
    return Result(
        stage=work.stage,
        backend=work.backend,
        images_per_s=rate,
        slowest=min(rates),
        fastest=max(rates),
        ms=1e3 * work.batch / rate,
        host_ms=1e3 * statistics.median(host_seconds) * work.batch / work.images,
        batch=work.batch,
        threads=work.threads,
        repeats=len(rates),
        bytes_per_s=work.bytes / work.images * rate if work.bytes else None,
        operation=work.operation,
        crops=work.crops,
        levels=work.levels,
    )


def generated(batch: int) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
    """`Bench.sample` without a beton: noise in COCO's most frequent sizes."""
    noise = np.random.default_rng(1).integers(0, 256, (batch, 640, 640, 3), np.uint8)
    return np.arange(batch), torch.from_numpy(noise), *generated_sizes(batch)


def generated_sizes(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width int64 [B], drawn from COCO's most frequent sizes."""
    sizes = np.array([(480, 640), (640, 480), (427, 640), (640, 427)])
    height, width = sizes[np.random.default_rng(0).integers(0, len(sizes), batch)].T
    return height, width
