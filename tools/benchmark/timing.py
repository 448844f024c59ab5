"""How a stage of the benchmark is timed, what it is timed on, and what comes out."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from train.config import RunConfig

if TYPE_CHECKING:
    from pipeline.beton import Beton


@dataclass(frozen=True)
class StepDetail:
    """What else is known of a training step."""

    first_s: float
    """Seconds of the first one, which compiles and allocates."""
    peak_bytes: int | None
    """Most memory that it had on the GPU, weights included; None without one."""
    parts: dict[str, float] | None = None
    """ms of each part, of one step in the profiler, whose own work makes it slower."""
    beside: float | None = None
    """Share that is not the networks' own forward and backward."""
    operators: int | None = None
    """ATen operators that no other one calls."""
    launches: int | None = None
    """Kernels and copies on the GPU."""
    host_waits: int | None = None
    """Times that a value is brought to the host, which on a GPU waits for it; without a GPU, by
    operators whose result's shape or value the host needs."""
    active_pairs: float | None = None
    """Per image and view: slots that were contrasted."""
    largest_batch: int | None = None
    """That fits the GPU, to an eighth."""


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
    """Until the calls for a batch returned; less than `ms` where a device works on."""
    batch: int
    threads: int
    repeats: int
    bytes_per_s: float | None = None
    """Of the bytes that must move at least; each stage says which those are."""
    operation: str | None = None
    """The one augmentation operation that was on; "overlap": a pipeline while training; the one
    setting in which a step differs from the configuration."""
    crops: str | None = None
    """Where a pipeline crops."""
    ratio: float | None = None
    """Speed as a multiple of `ratio_to`'s, by turns in the same run."""
    ratio_to: str | None = None
    wait_share: float | None = None
    """Share of the time in which a training step waited for data."""
    detail: StepDetail | None = None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        what = "while training" if self.operation == "overlap" else self.operation
        parts = (self.stage, self.backend, self.crops and f"crops {self.crops}", what)
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Work:
    """What is timed. One call handles `images` images, for which `bytes` must move at least."""

    stage: str
    backend: str
    call: Callable[[], object]
    images: float
    batch: int
    threads: int
    bytes: int | None = None
    operation: str | None = None
    crops: str | None = None


@dataclass
class Bench:
    """What is measured and on what, and what has come out so far."""

    config: RunConfig
    beton: "Beton | None"
    """None: generated canvases."""
    batch: int
    threads: tuple[int, ...]
    repeats: int
    seconds: float
    """How long a repeat lasts; at least one call."""
    images: int
    """How many are read and decoded at a time."""
    device: torch.device
    backends: tuple[str, ...]
    also: tuple[str, ...] = ()
    """What the step is measured with beside the configuration's own settings."""
    largest: bool = False
    """Whether to look for the largest batch."""
    results: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the views and of the step's products, as in training; fp16 needs a GPU."""
        types = {"bf16": torch.bfloat16}
        if self.device.type == "cuda":
            types["fp16"] = torch.float16
        return types.get(self.config.efficiency.precision, torch.float32)

    @property
    def cores(self) -> int:
        """The threads of every stage but the decoding, which is measured with each number."""
        return max(self.threads)

    def measure(self, works: Sequence[Work], ratio_to: str | None = None) -> list[Result]:
        """Time ways of doing the same by turns: what disturbs one disturbs the others. Ratios are
        medians of those within a round.
        """
        calls = []
        for work in works:
            self.tell(work)
            work.call()  # compiles, allocates
            once, _ = self._time(work, 1)
            calls.append(max(1, round(self.seconds / once)))
        rounds = [
            [
                tuple(seconds / count for seconds in self._time(work, count))
                for work, count in zip(works, calls, strict=True)
            ]
            for _ in range(self.repeats)
        ]
        speeds = [
            [work.images / seconds for work, (seconds, _) in zip(works, turn, strict=True)]
            for turn in rounds
        ]
        base = next((i for i, work in enumerate(works) if work.backend == ratio_to), None)
        for i, work in enumerate(works):
            rates = [turn[i] for turn in speeds]
            result = to_result(work, rates, [turn[i][1] for turn in rounds])
            if base is not None and base != i:
                ratio = statistics.median(turn[i] / turn[base] for turn in speeds)
                result = replace(result, ratio=ratio, ratio_to=ratio_to)
            self.results.append(result)
        return self.results[-len(works) :]

    def find(self, stage: str, *backends: str) -> Result | None:
        """The whole stage's first result by one of `backends`."""
        found = (r for r in self.results if r.stage == stage and r.operation is None)
        return next((r for r in found if r.backend in backends), None)

    def skip(self, what: str, reason: str) -> None:
        """Say and record what is not measured here."""
        self.skipped.append(f"{what}: {reason}")
        print(f"skipped {what}: {reason}", file=sys.stderr, flush=True)

    def tell(self, work: Work) -> None:
        """A line of progress."""
        parts = (work.backend, work.crops and f"crops {work.crops}", work.operation)
        what = ", ".join(part for part in parts if part)
        print(f"{work.stage}: {what}, {work.threads} threads", file=sys.stderr, flush=True)

    def _time(self, work: Work, calls: int) -> tuple[float, float]:
        """Seconds of `calls` calls, on the device's clock where there is one, and the host's until
        the last call returned.
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
        """A batch: which records int64 [B], canvas uint8 [B, Hmax, Wmax, 3] on the host, height and
        width int64 [B].
        """
        if self.beton is None:
            return generated(self.batch)
        from pipeline.decode import CanvasLoader

        which = np.random.default_rng(0).permutation(len(self.beton))[: self.batch]
        loader = CanvasLoader(self.beton, self.cores, pin=False)
        canvas = next(canvas.clone() for _, canvas in loader.decode([which]))
        return which, canvas, self.beton.height[which], self.beton.width[which]


def to_result(work: Work, rates: list[float], host_seconds: list[float]) -> Result:
    """From images/s and the host's seconds a call, of each repeat."""
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
    )


def generated(batch: int) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
    """`Bench.sample` without a file: noise in COCO's commonest sizes."""
    generator = np.random.default_rng(0)
    sizes = np.array([(480, 640), (640, 480), (427, 640), (640, 427)])
    height, width = sizes[generator.integers(0, len(sizes), batch)].T
    canvas = torch.from_numpy(generator.integers(0, 256, (batch, 640, 640, 3), np.uint8))
    return np.arange(batch), canvas, height, width
