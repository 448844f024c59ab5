"""The stages from a beton to a training step, each measured alone on the same images.

Only stages that read a beton need libturbojpeg.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.augment import get_backend
from pipeline.choices import CROPS, Crops
from pipeline.errors import UserError
from pipeline.ffcv_format import JPEG
from pipeline.views import ViewConfig, ViewParams, sample_views
from tools.benchmark import decoders
from tools.benchmark.options import FROM_A_FILE
from tools.benchmark.step import Step, make_step, step
from tools.benchmark.timing import Bench, Work, generated, to_result
from tools.benchmark.verdict import FINISHED, find, plain_copy
from train.pretrained import build_model
from train.run.log import Stopwatch

if TYPE_CHECKING:
    from pipeline.beton import Beton
    from pipeline.decode import RecordLoader
    from pipeline.source import Batch

PER_IMAGE = 32
"""Batch of the reference backend: it works image by image, so a larger batch only takes longer."""
EPOCH = 8
"""Batches of the shortest epoch; the images of a smaller beton are repeated."""
COPY = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes of the copied buffers: far larger than any cache."""


def repeated(beton: "Beton", count: int) -> "Beton":
    """The beton with its images repeated, so that there are at least `count`."""
    if len(beton) >= count:
        return beton
    longer = copy.copy(beton)
    longer.file = os.dup(beton.file)  # both betons close their file
    times = -(-count // len(beton))
    longer.records = np.tile(beton.records, (times, 1))
    longer.checksums = np.tile(beton.checksums, times)
    longer.has_tiles = np.tile(beton.has_tiles, times)
    longer.height, longer.width = np.tile(beton.height, times), np.tile(beton.width, times)
    longer.index = np.arange(len(longer.records))
    longer.label = None
    return longer


def read(bench: Bench) -> None:
    """See `options.STAGES`."""
    beton = _beton(bench)
    records = np.unique(beton.records[: bench.images, :2], axis=0).tolist()
    size = sum(count for _, count in records)

    def part(records: Iterator[list[int]]) -> None:
        for pointer, count in records:
            os.pread(beton.file, count, pointer)

    def call() -> None:
        _in_threads(part, records, bench.cores)

    def forget_first() -> None:
        for pointer, count in records:
            os.posix_fadvise(beton.file, pointer, count, os.POSIX_FADV_DONTNEED)
        call()

    for backend, read_all in (("page cache", call), ("disk", forget_first)):
        work = Work("read", backend, read_all, len(records), bench.batch, bench.cores, size)
        bench.measure([work])


def decode(bench: Bench) -> None:
    """See `options.STAGES`."""
    from pipeline.decode import CanvasLoader, CropLoader

    beton = _beton(bench)
    images = np.arange(min(bench.images, len(beton)))
    batches = np.array_split(images, max(1, len(images) // bench.batch))
    jpegs = _jpegs(beton, images)
    pixels = int((beton.height[images] * beton.width[images]).sum()) * 3
    pin, views = bench.device.type == "cuda", bench.views
    for threads in bench.threads:
        made = partial(Work, "decode", images=len(images), batch=bench.batch, threads=threads)
        whole = CanvasLoader(beton, threads, pin)
        drawn: dict[str, Any] = {"views": views, "seed": 0, "views_of": lambda _: views}
        cut = CropLoader(beton, threads, pin, **drawn)
        finish = CropLoader(beton, threads, pin, colours=bench.dtype, **drawn)
        works = [
            made("loader", partial(_decode_all, whole, batches), bytes=pixels),
            made("loader", partial(_decode_all, cut, batches), bytes=pixels, crops="host"),
            made(
                "loader", partial(_decode_all, finish, batches), bytes=pixels, crops="host",
                operation=FINISHED,
            ),
        ]  # fmt: skip
        if jpegs:
            bare = partial(_in_threads, partial(_decode_part, beton), jpegs, threads)
            works.insert(0, made("libjpeg-turbo", bare, bytes=pixels))
            for name, call in decoders.usable(bench, [jpeg for jpeg, *_ in jpegs], threads).items():
                levels = decoders.difference(call, map(beton.decode, images.tolist()))
                works.append(made(name, call, bytes=pixels, levels=levels))
        bench.measure(works, ratio_to="libjpeg-turbo")


def _decode_all(loader: "RecordLoader", batches: Sequence[np.ndarray]) -> None:
    for _ in loader.decode(batches):
        pass


def _jpegs(beton: "Beton", images: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    """Bytes, height and width of each image; empty unless all are JPEGs."""
    records = beton.records[images].tolist()
    if any(mode != JPEG for *_, mode in records):
        return []
    return [
        (np.frombuffer(os.pread(beton.file, size, pointer), np.uint8), height, width)
        for pointer, size, height, width, _ in records
    ]


def _decode_part(beton: "Beton", jpegs: Iterator[tuple[np.ndarray, int, int]]) -> None:
    from pipeline import turbojpeg

    decoder = turbojpeg.Decoder(0)
    pixels = np.empty(int((beton.height * beton.width).max()) * 3, np.uint8)
    for jpeg, height, width in jpegs:
        canvas = pixels[: height * width * 3].reshape(height, width, 3)
        if complaint := decoder.decompress(jpeg, canvas):
            raise UserError(f"{beton.path}: {complaint}")


def params(bench: Bench) -> None:
    """See `options.STAGES`."""
    images = _sizes(bench)
    views = bench.views
    ways: dict[str | None, ViewConfig] = {None: views}
    if views.mask_ratio:
        ways["without masks"] = views.unmasked()
    works = [
        Work(
            "params", "numba", partial(sample_views, 0, 0, *images, drawn), len(images[0]),
            bench.batch, 1, operation=name,
        )
        for name, drawn in ways.items()
    ]  # fmt: skip
    bench.measure(works, ratio_to="numba")


def _sizes(bench: Bench) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if bench.beton is None:
        which, _, height, width = generated(bench.batch)
        return which, height, width
    which = np.random.default_rng(0).permutation(len(bench.beton))[: bench.batch]
    return which, bench.beton.height[which], bench.beton.width[which]


def transfer(bench: Bench) -> None:
    """See `options.STAGES`."""
    if bench.device.type == "cuda":
        _, canvas, *_ = bench.sample()
        pinned, target = canvas.pin_memory(), torch.empty_like(canvas, device=bench.device)
        call = partial(target.copy_, pinned, non_blocking=True)
        size = canvas.numel()
        work = Work("transfer", "host to device", call, len(canvas), bench.batch, 1, size)
        bench.measure([work])
    else:
        bench.skip("transfer, host to device", "there is no device; a copy in memory instead")
    _copy(bench)


def _copy(bench: Bench) -> None:
    """A plain copy; its images/s are the upper bound that memory bandwidth sets for views."""
    which, height, width = _sizes(bench)
    drawn = sample_views(0, 0, which, height, width, bench.views)
    kind = bench.device.type
    source = torch.randint(0, 256, (COPY[kind] // 8,), device=bench.device)
    call = partial(torch.empty_like(source).copy_, source)
    moved = 2 * COPY[kind]
    images = moved / (least_bytes(drawn, bench.views.size, bench.dtype) / bench.batch)
    name = "device copy" if kind == "cuda" else "memory copy"
    bench.measure([Work("transfer", name, call, images, bench.batch, 1, moved)])


def least_bytes(drawn: ViewParams, size: int, dtype: torch.dtype) -> int:
    """Bytes that augmentation must move: the crops' pixels read, the views written."""
    x0, y0, x1, y1 = np.moveaxis(drawn.crops.astype(np.int64), -1, 0)
    return int(((x1 - x0) * (y1 - y0)).sum() * 3) + drawn.grey.size * 3 * size**2 * dtype.itemsize


def operations(views: ViewConfig) -> dict[str, ViewConfig]:
    """Each operation alone: all others are off, except crop and resize."""
    off = {"jitter": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    off |= {"flip": 0, "grey": 0}
    plain: Mapping[str, Any] = {**off, "blur": (0, 0), "solarize": (0, 0)}
    alone: dict[str, dict[str, Any]] = {"crop + resize": {}, "flip": {"flip": 1}}
    for amount in ("brightness", "contrast", "saturation", "hue"):
        alone[amount] = {"jitter": 1, amount: getattr(views, amount)}
    alone |= {"grey": {"grey": 1}, "blur": {"blur": (1, 1)}, "solarize": {"solarize": (1, 1)}}
    return {name: replace(views, **{**plain, **on}) for name, on in alone.items()}


def augment(bench: Bench) -> None:
    """See `options.STAGES`."""
    if plain_copy(bench.results) is None:
        _copy(bench)
    backends = _usable(bench, "augment")
    which, host, height, width = bench.sample()
    canvas = host.to(bench.device)
    sizes = torch.from_numpy(np.stack([height, width], axis=1))
    side, device, dtype = bench.views.size, bench.device, bench.dtype
    shape = (2, len(which), side, side, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def work(name: str, operation: str | None, views: ViewConfig) -> Work:
        few = slice(_batch(bench, name))
        count = len(which[few])
        drawn = sample_views(0, 0, which[few], height[few], width[few], views)
        backend = get_backend(name)
        if operation == "normalise":
            crops = pixels[:, few].contiguous()
            call = partial(backend.colour, crops, drawn, device, dtype)
            moved = crops.numel() * (1 + dtype.itemsize)
        else:
            call = partial(backend.apply, canvas[few], sizes[few], drawn, side, device, dtype)
            moved = least_bytes(drawn, side, dtype)
        return Work("augment", name, call, count, count, _threads(bench, name), moved, operation)

    alone = operations(bench.views)
    recipes: list[tuple[str | None, ViewConfig]] = [(None, bench.views), *alone.items()]
    for operation, views in (*recipes, ("normalise", alone["crop + resize"])):
        bench.measure([work(name, operation, views) for name in backends], ratio_to="kornia")


def pipeline(bench: Bench) -> None:
    """See `options.STAGES`."""
    beton = _beton(bench)
    backends = _usable(bench, "pipeline")
    model = build_model(bench.config).to(bench.device)
    train = make_step(model, bench.config, "fast", bench.dtype)
    for crops in CROPS:
        if crops == "dali" and not decoders.has_dali(bench, "pipeline"):
            continue
        results = []
        for name in backends:
            batch = _batch(bench, name)
            with closing(batches(bench, name, crops, batch)) as stream:
                size = int(beton.records[:, 1].mean() * batch)
                call = partial(next, stream)
                work = Work("pipeline", name, call, batch, batch, bench.cores, size, crops=crops)
                results += bench.measure([work])
        fastest = max(results, key=lambda result: result.images_per_s)
        finished = ["compiled"] if crops == "host" and "compiled" in backends else []
        for name in dict.fromkeys([fastest.backend, *finished]):
            _overlap(bench, train, name, crops)


def batches(bench: Bench, backend: str, crops: Crops, batch: int) -> Generator["Batch", None, None]:
    """Endless batches from a loader that has started."""
    from pipeline.loader import make_loader

    beton = _beton(bench)
    data = bench.config.data
    loader = make_loader(
        beton, bench.views, batch, seed=0, backend=backend, crops=crops, order=data.order,
        window_bytes=int(data.window_gb * 1e9), device=bench.device, dtype=bench.dtype,
        threads=bench.cores,
    )  # fmt: skip
    # In the first epoch, DALI's source also checks each record: not typical of a run.
    warm = loader.steps_per_epoch if crops == "dali" and len(beton) <= EPOCH * bench.batch else 4

    def endless() -> Generator["Batch", None, None]:
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    stream = endless()
    for _ in range(warm):
        next(stream)
    return stream


def _overlap(bench: Bench, train: Step, name: str, crops: Crops) -> None:
    """Training steps on the loader's batches; the trainer's stopwatch measures their data wait."""
    batch = bench.batch
    work = Work(
        "pipeline", name, lambda: None, batch, batch, bench.cores, operation="overlap", crops=crops
    )
    bench.progress(work)
    stopwatch = Stopwatch(bench.device)
    rates, waits = [], []
    with closing(batches(bench, name, crops, batch)) as stream:
        for turn in range(bench.repeats + 1):
            stopwatch.restart()
            began = time.perf_counter()
            while stopwatch.steps < 2 or time.perf_counter() - began < bench.seconds:
                with stopwatch.waiting():
                    views = next(stream)
                train(views.views, views.overlap, views.flipped, views.masks)
                stopwatch.steps += 1
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
            steps, seconds, wait = stopwatch.read()
            if turn:  # the first one warms up
                rates.append(steps * batch / seconds)
                waits.append(wait)
    result = replace(
        to_result(work, rates, [batch / rate for rate in rates]),
        wait_share=statistics.median(waits),
    )
    if cached := find(bench.results, "step", "fast"):
        ratio = result.images_per_s / cached.images_per_s
        result = replace(result, ratio=ratio, ratio_to="step")
    bench.results.append(result)


STAGES: dict[str, Callable[[Bench], None]] = {
    "read": read,
    "decode": decode,
    "params": params,
    "transfer": transfer,
    "augment": augment,
    "step": step,
    "pipeline": pipeline,
}


def _threads(bench: Bench, name: str) -> int:
    """Threads of the host: compiled, and on a CPU kornia, use PyTorch's."""
    several = name == "compiled" or (bench.device.type == "cpu" and name == "kornia")
    return torch.get_num_threads() if several else 1


def _batch(bench: Bench, name: str) -> int:
    return min(bench.batch, PER_IMAGE) if name == "reference" else bench.batch


def _beton(bench: Bench) -> "Beton":
    if bench.beton is None:
        raise UserError(f"--synthetic: {', '.join(FROM_A_FILE)} need a beton")
    return bench.beton


def _usable(bench: Bench, stage: str) -> list[str]:
    """Backends that run on this device."""
    if bench.device.type == "cuda" or "triton" not in bench.backends:
        return list(bench.backends)
    bench.skip(f"{stage} by triton", "without a GPU it runs in an interpreter, for tests only")
    return [name for name in bench.backends if name != "triton"]


def _in_threads(part: Callable[[Iterator[Any]], None], items: Sequence[Any], threads: int) -> None:
    """Threads take from `items` until none is left. Raises the error of a thread."""
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(part, left) for _ in range(threads)]:
            done.result()
