"""Throughput by stage of the road from a beton to a trained step, each stage measured alone on the
same images.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import SlotCon
from pipeline import turbojpeg
from pipeline.augment import BACKENDS, Backend, get_backend
from pipeline.beton import Beton
from pipeline.errors import UserError, run
from pipeline.ffcv_format import JPEG
from pipeline.loader import CanvasLoader, ViewLoader
from pipeline.views import sample_views
from train.config import RunConfig, load_config
from train.lars import LARS
from train.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m tools.benchmark decode --data coco.beton
  python -m tools.benchmark all --data coco.beton --config configs/coco_r50_800ep.yaml \\
      --batch 64 --json bench.json

`decode` compares bare libjpeg-turbo on JPEG bytes in memory (the ceiling) with slotstream's loader,
which reads the same records from the file and decodes them into padded canvases.
"""


@dataclass(frozen=True)
class Result:
    """One stage's speed: median images/s over the repeats, the slowest and fastest of them, ms a
    batch.
    """

    stage: str
    backend: str
    images_per_s: float
    slowest: float
    fastest: float
    ms: float
    batch: int
    threads: int
    repeats: int


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what: the first `images` records of the beton, in batches."""

    beton: Beton
    config: RunConfig
    batch: int
    threads: int
    repeats: int
    device: torch.device
    backends: tuple[str, ...]

    @property
    def batches(self) -> list[np.ndarray]:
        order = np.random.default_rng(0).permutation(len(self.beton))
        whole = max(1, len(order) // self.batch)
        return [order[b * self.batch : (b + 1) * self.batch] for b in range(whole)]

    def time(self, stage: str, backend: str, work: Callable[[], int]) -> Result:
        """Run `work`, which returns how many images it handled, once to warm up and then `repeats`
        times.
        """
        work()
        return self._result(stage, backend, [self._rate(work) for _ in range(self.repeats)])

    def compare(self, stage: str, works: dict[str, Callable[[], int]]) -> list[Result]:
        """Time several ways of doing the same by turns: what disturbs one disturbs the others."""
        for work in works.values():
            work()
        rounds = [[self._rate(work) for work in works.values()] for _ in range(self.repeats)]
        results = [
            self._result(stage, name, list(rates))
            for name, rates in zip(works, zip(*rounds, strict=True), strict=True)
        ]
        ratio = statistics.median(last / first for first, *_, last in rounds)
        first, *_, last = works
        print(f"{stage:9} {last} is {ratio:.1%} of {first} (median of {len(rounds)} rounds)")
        return results

    def _rate(self, work: Callable[[], int]) -> float:
        self._synchronize()
        began = time.perf_counter()
        images = work()
        self._synchronize()
        return images / (time.perf_counter() - began)

    def _result(self, stage: str, backend: str, rates: list[float]) -> Result:
        rate = statistics.median(rates)
        result = Result(
            stage,
            backend,
            rate,
            min(rates),
            max(rates),
            1e3 * self.batch / rate,
            self.batch,
            self.threads,
            self.repeats,
        )
        print(
            f"{stage:9} {backend:14} {rate:10.1f} images/s"
            f"  ({min(rates):.1f} to {max(rates):.1f})  {result.ms:9.2f} ms a batch",
            flush=True,
        )
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read(bench: Bench) -> Iterator[Result]:
    """Bytes of the records from the file (or the page cache) into memory, no decoding."""

    def part(records: np.ndarray) -> None:
        for pointer, size in records[:, :2]:
            os.pread(bench.beton.file, size, pointer)

    yield bench.time("read", "pread", lambda: _in_threads(bench, part, bench.beton.records))


def decode(bench: Bench) -> Iterator[Result]:
    """The ceiling, bare libjpeg-turbo on bytes in memory, and the loader's canvases of the same
    images.
    """
    jpegs = [
        (np.frombuffer(os.pread(bench.beton.file, size, pointer), np.uint8), height, width)
        for pointer, size, height, width, mode in bench.beton.records
        if mode == JPEG
    ]
    largest = int((bench.beton.height * bench.beton.width).max()) * 3

    def part(own: list[tuple[np.ndarray, int, int]]) -> None:
        decoder, pixels = turbojpeg.Decoder(0), np.empty(largest, np.uint8)
        for jpeg, height, width in own:
            code = turbojpeg.decompress(
                decoder.handle, jpeg.ctypes.data, jpeg.size, pixels.ctypes.data,
                int(width), 0, int(height), turbojpeg.RGB, turbojpeg.ACCURATE_DCT,
            )  # fmt: skip
            if code != 0:
                raise UserError(f"{bench.beton.path}: {decoder.error()}")

    loader = CanvasLoader(bench.beton, bench.threads, pin=bench.device.type == "cuda")
    images = np.arange(len(bench.beton))
    everything = np.array_split(images, max(1, len(images) // bench.batch))
    works: dict[str, Callable[[], int]] = {
        "libjpeg-turbo": lambda: _in_threads(bench, part, jpegs),
        "loader": lambda: sum(len(which) for which, _ in loader.decode(everything)),
    }
    if jpegs:
        yield from bench.compare("decode", works)
    else:
        yield bench.time("decode", "loader", works["loader"])


def params(bench: Bench) -> Iterator[Result]:
    """All random numbers of a batch's paired views."""
    which = bench.batches[0]
    height, width = bench.beton.height[which], bench.beton.width[which]

    def work() -> int:
        for epoch in range(20):
            sample_views(0, epoch, which, height, width, bench.config.views)
        return 20 * len(which)

    yield bench.time("params", "numba", work)


def augment(bench: Bench) -> Iterator[Result]:
    """Both views of a decoded batch, from canvas to normalised tensors, by each backend."""
    which = bench.batches[0]
    loader = CanvasLoader(bench.beton, bench.threads, pin=False)
    canvas = next(canvas.clone() for _, canvas in loader.decode([which])).to(bench.device)
    sizes = torch.from_numpy(bench.beton.records[which, 2:4])
    views = bench.config.views
    drawn = sample_views(0, 0, which, bench.beton.height[which], bench.beton.width[which], views)

    def work(backend: Backend) -> int:
        backend(canvas, sizes, drawn, views.size, bench.device, torch.float32)
        return len(which)

    for name in bench.backends:
        yield bench.time("augment", name, partial(work, get_backend(name)))


def step(bench: Bench) -> Iterator[Result]:
    """A training step on views that are already there: teacher, both forwards, loss, backward,
    LARS.
    """
    model = SlotCon(bench.config.model).to(bench.device).to(memory_format=torch.channels_last)
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], lr=0.1)
    side = bench.config.views.size
    views = torch.randn(2, bench.batch, 3, side, side, device=bench.device)
    overlap = torch.tensor([0.0, 0.0, 1.0, 1.0], device=bench.device).expand(2, bench.batch, 4)
    flipped = torch.zeros(2, bench.batch, dtype=torch.bool, device=bench.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(bench.config.efficiency.precision)

    def work() -> int:
        model.update_teacher(0.99)
        with torch.autocast(bench.device.type, dtype=dtype, enabled=dtype is not None):
            out = model(views, overlap, flipped)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        return bench.batch

    yield bench.time("step", "plain", work)


def pipeline(bench: Bench) -> Iterator[Result]:
    """The whole data path: beton to paired views on the device."""

    def work(loader: ViewLoader) -> int:
        return sum(len(batch.index) for batch in loader.epoch(0))

    for name in bench.backends:
        loader = ViewLoader(
            bench.beton, bench.config.views, min(bench.batch, len(bench.beton)),
            seed=0, backend=name, device=bench.device, threads=bench.threads,
        )  # fmt: skip
        yield bench.time("pipeline", name, partial(work, loader))


STAGES: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "read": read,
    "decode": decode,
    "params": params,
    "augment": augment,
    "step": step,
    "pipeline": pipeline,
}


def _in_threads(
    bench: Bench, part: Callable[[Any], None], items: Sequence[Any] | np.ndarray
) -> int:
    """Deal `items` out to the bench's threads; raises what a thread raises."""
    with ThreadPoolExecutor(bench.threads) as pool:
        list(pool.map(part, [items[t :: bench.threads] for t in range(bench.threads)]))
    return len(items)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.benchmark",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"], help="what to measure")
    parser.add_argument("--data", required=True, help="the beton to measure on")
    parser.add_argument(
        "--config", default="configs/demo_cpu.yaml", help="views, model and precision of the stages"
    )
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (64)")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="decoding threads (all cores)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed repeats after one warm-up (5)"
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--json", type=Path, help="write the results here as well")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.batch < 1 or args.threads < 1 or args.repeats < 1:
        raise UserError("--batch, --threads and --repeats must be at least 1")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here")
    config, _ = load_config(["--config", args.config, "--data.path", args.data])
    bench = Bench(
        Beton(args.data), config, args.batch, args.threads, args.repeats,
        torch.device(args.device), tuple(args.backends),
    )  # fmt: skip
    names = list(STAGES) if "all" in args.stages else args.stages
    results = [asdict(result) for name in names for result in STAGES[name](bench)]
    if args.json:
        write_json(args.json, provenance() | {"results": results})


if __name__ == "__main__":
    run(main)
