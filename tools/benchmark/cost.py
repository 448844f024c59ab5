"""What a recipe costs on the machine at hand: its step at every size of its views and its loader
are measured, then hours, energy and CO2e of the whole recipe follow, plainly written and fast.
"""

import copy
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tools.benchmark.plain_step import is_plain
from tools.benchmark.stages import EPOCH, batches, repeated
from tools.benchmark.step import make_step, spread_prototypes, step_data, step_views
from tools.benchmark.timing import Bench, Work
from tools.benchmark.verdict import aligned
from train.config import RunConfig, load_config
from train.run.provenance import provenance, write_json

CO2_PER_KWH = 445.0
"""g CO2 a kWh: the world's electricity in 2024 (IEA, Electricity 2025, "Emissions")."""
GPUS = (1, 2, 4, 8, 16, 32, 64)
IMAGES = {"coco": 118_287, "cocoplus": 241_690, "imagenet": 1_281_167}
"""Of the sets of the recipes, by the beton's name, where the beton is not there."""
REPEATS = 3
POWER_SECONDS = 3.0

PEAKS = (
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.4),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 311.9),
    ("L40S", 362.1),
    ("V100", 125.0),
    ("T4", 65.1),
)
"""Parts of a GPU's name and its dense fp16 and bf16 TFLOP/s on tensor cores, from NVIDIA's data
sheets (where those count sparsity, half of theirs). The first that fits counts."""


@dataclass(frozen=True)
class Size:
    """A size of the views, and what was measured with it."""

    side: int
    epochs: int
    gflop: float
    """Of an image: two views, student forward and backward, teacher forward."""
    images_per_s: dict[str, float]
    """By backend, of the step alone."""
    loader: float | None
    """images/s on this machine, None without a beton."""
    watts: dict[str, float]
    """By backend, of a GPU; empty where it does not tell."""


@dataclass(frozen=True)
class Cost:
    """The whole recipe."""

    backend: str
    gpus: int
    measured: bool
    """Whether it is this many GPUs that were measured; if not: if it scaled perfectly."""
    images_per_s: float
    """Mean over the recipe."""
    share_of_peak: float | None
    hours: float
    gpu_hours: float
    kwh: float | None
    co2_kg: float | None


class Recipe(NamedTuple):
    """What there is to do."""

    name: str
    images: int
    """Of an epoch."""
    source: str
    """Of that number."""
    epochs: dict[int, int]
    """By the views' side."""


def recipe_of(config: RunConfig, beton_images: int | None) -> Recipe:
    """Raises UserError where nobody knows how many images there are."""
    stem = Path(config.data.path).stem
    count = beton_images or IMAGES.get(stem)
    if count is None:
        raise UserError(
            f"cost: how many images are in {config.data.path}? It is not there; give --data"
        )
    whole = count // config.train.batch_size * config.train.batch_size
    source = "the beton's" if beton_images else f"those of {stem}, whose beton is not there"
    epochs = Counter(config.view_size(epoch) for epoch in range(config.train.epochs))
    return Recipe(config.name, whole, source, dict(epochs))


def costs(
    recipe: Recipe, sizes: Sequence[Size], peak: float | None, co2_per_kwh: float, loaders: int = 1
) -> list[Cost]:
    """For both backends on `GPUS`, from what one GPU does; `loaders`: GPUs that share the loader
    that was measured. `peak` in TFLOP/s, `co2_per_kwh` in g.
    """
    found = []
    for backend in sizes[0].images_per_s:
        images = [recipe.images * size.epochs for size in sizes]
        rates = [
            min(size.images_per_s[backend], size.loader / loaders if size.loader else float("inf"))
            for size in sizes
        ]
        seconds = [count / rate for count, rate in zip(images, rates, strict=True)]
        total = sum(seconds)
        flop = sum(count * size.gflop * 1e9 for count, size in zip(images, sizes, strict=True))
        kwh = None
        if all(backend in size.watts for size in sizes):
            joules = [s * size.watts[backend] for s, size in zip(seconds, sizes, strict=True)]
            kwh = sum(joules) / 3.6e6
        for gpus in GPUS:
            found.append(
                Cost(
                    backend=backend,
                    gpus=gpus,
                    measured=gpus == 1,
                    images_per_s=gpus * sum(images) / total,
                    share_of_peak=flop / total / (peak * 1e12) if peak else None,
                    hours=total / gpus / 3600,
                    gpu_hours=total / 3600,
                    kwh=kwh,
                    co2_kg=None if kwh is None else kwh * co2_per_kwh / 1e3,
                )
            )
    return found


def gflop_of(config: ModelConfig, side: int) -> float:
    """Counted operator by operator, a multiplication and an addition being two; of one image."""
    model = SlotCon(config)
    with FlopCounterMode(display=False) as counter:
        model(*step_views(2, side)).loss.backward()
    return counter.get_total_flops() / 2 / 1e9


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a GPU in half precision; None where it, or that of another type, is not known."""
    if dtype == torch.float32:
        return None
    return next((peak for part, peak in PEAKS if part in name), None)


# ---- Measuring ----


def measure(args: Namespace) -> None:
    """Measure for about `--minutes`, print, write."""
    bench, beton_images = prepare(args)
    recipe = recipe_of(bench.config, beton_images)
    pieces = len(recipe.epochs) * (2 + (bench.beton is not None))
    bench.seconds = 60 * args.minutes / (pieces * (REPEATS + 2))
    sizes = [_measure_size(bench, side, epochs) for side, epochs in recipe.epochs.items()]
    if args.watts:
        sizes = [replace(s, watts=dict.fromkeys(s.images_per_s, args.watts)) for s in sizes]
    machine = provenance()
    gpus = machine["hardware"]["gpus"]
    peak = peak_of(gpus[0], bench.dtype) if bench.device.type == "cuda" else None
    found = costs(recipe, sizes, peak, args.co2_per_kwh, max(1, len(gpus)))
    settings = {
        "device": bench.device.type,
        "batch": bench.batch,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "config": " ".join(args.config),
        "minutes": args.minutes,
        "co2_g_per_kwh": args.co2_per_kwh,
        "watts": "given" if args.watts else "NVML" if sizes[0].watts else None,
        "peak_tflops": peak,
        "recipe": recipe._asdict(),
    }
    print(report(recipe, sizes, found, settings))
    if args.json:
        content = {
            "settings": settings,
            "results": [asdict(result) for result in bench.results],
            "skipped": bench.skipped,
            "sizes": [asdict(size) for size in sizes],
            "cost": [asdict(cost) for cost in found],
        }
        write_json(args.json, machine | content)


def prepare(args: Namespace) -> tuple[Bench, int | None]:
    """Configuration and beton, if it is there; how many images that holds."""
    path = ["--data.path", args.data] if args.data else []
    config, _ = load_config([*args.config, *path])
    device = torch.device(args.device)
    batch = args.batch or (config.train.batch_size if device.type == "cuda" else 4)
    beton, count = None, None
    if args.data or Path(config.data.path).is_file():
        from pipeline.beton import Beton

        whole = Beton(config.data.path)
        beton, count = repeated(whole, EPOCH * batch), len(whole)
    bench = Bench(
        config=config,
        beton=beton,
        batch=batch,
        threads=tuple(args.threads),
        repeats=REPEATS,
        seconds=1.0,
        images=batch,
        device=device,
        backends=(),
    )
    return bench, count


def _measure_size(bench: Bench, side: int, epochs: int) -> Size:
    """The step plain and fast, by turns, and the loader, on views of `side` pixels."""
    views = replace(bench.config.views, size=side)
    train = replace(bench.config.train, view_sizes=())
    config = replace(bench.config, views=views, train=train)
    start = SlotCon(config.model)
    spread_prototypes(start, step_views(min(bench.batch, 8), side)[0])
    backends = ("plain", "fast") if is_plain(config.model) else ("fast",)
    works = []
    for backend in backends:
        model = copy.deepcopy(start).to(bench.device)
        data = step_data(bench, side, bench.batch, backend)
        call = partial(make_step(model, config, backend, bench.dtype), *data)
        works.append(_work(bench, "step", backend, side, call))
    rows = bench.measure(works, ratio_to="plain")
    power = {work.backend: watts(work.call, bench.device) for work in works}
    return Size(
        side=side,
        epochs=epochs,
        gflop=gflop_of(config.model, side),
        images_per_s={row.backend: row.images_per_s for row in rows},
        loader=_loader(replace(bench, config=config), side) if bench.beton else None,
        watts={name: value for name, value in power.items() if value is not None},
    )


def _loader(bench: Bench, side: int) -> float:
    """images/s of the data path that the configuration names. `bench` shares its results."""
    data = bench.config.data
    with closing(batches(bench, data.backend, data.crops, bench.batch)) as stream:
        work = _work(bench, "pipeline", data.backend, side, partial(next, stream))
        work = replace(work, crops=data.crops, threads=bench.cores)
        return bench.measure([work])[0].images_per_s


def _work(bench: Bench, stage: str, backend: str, side: int, call: Callable[[], object]) -> Work:
    threads = torch.get_num_threads()
    operation = f"{side} pixels"
    return Work(stage, backend, call, bench.batch, bench.batch, threads, operation=operation)


def watts(call: Callable[[], object], device: torch.device) -> float | None:
    """Mean power of the GPU, by NVML, while `call` is repeated; None where nothing tells it."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.power_draw(device)
    except (ModuleNotFoundError, RuntimeError):
        return None
    ended, samples = threading.Event(), list[int]()

    def sample() -> None:
        while not ended.wait(0.05):
            samples.append(torch.cuda.power_draw(device))  # mW

    thread = threading.Thread(target=sample, daemon=True)
    timer = threading.Timer(POWER_SECONDS, ended.set)
    thread.start()
    timer.start()
    while not ended.is_set():
        call()
        torch.cuda.synchronize(device)
    thread.join()
    return sum(samples) / len(samples) / 1e3


# ---- Telling ----


def report(
    recipe: Recipe, sizes: Sequence[Size], found: Sequence[Cost], settings: dict[str, Any]
) -> str:
    """Three tables and what they rest on."""
    backends = list(sizes[0].images_per_s)
    machine = "GPU" if settings["device"] == "cuda" else "CPU"
    measured = [("pixels", "epochs", "GFLOP/image", *(f"{b} images/s" for b in backends),
                 "loader images/s", *(f"{b} W" for b in backends))]  # fmt: skip
    for size in sizes:
        measured.append(
            (
                str(size.side),
                str(size.epochs),
                f"{size.gflop:,.1f}",
                *(f"{size.images_per_s[b]:,.1f}" for b in backends),
                f"{size.loader:,.1f}" if size.loader else "not measured",
                *(f"{size.watts[b]:,.0f}" if b in size.watts else "unknown" for b in backends),
            )
        )
    totals = [("whole recipe", "images/s", "of peak", f"{machine}-hours", "kWh", "kg CO2e")]
    for cost in (cost for cost in found if cost.gpus == 1):
        totals.append(
            (
                cost.backend,
                f"{cost.images_per_s:,.1f}",
                "unknown" if cost.share_of_peak is None else f"{cost.share_of_peak:.1%}",
                _short(cost.gpu_hours),
                "unknown" if cost.kwh is None else _short(cost.kwh),
                "unknown" if cost.co2_kg is None else _short(cost.co2_kg),
            )
        )
    spread = [(f"{machine}s", *(f"{b} hours" for b in backends), "")]
    for gpus in GPUS:
        rows = [cost for cost in found if cost.gpus == gpus]
        note = "from measured rates" if rows[0].measured else "if it scaled perfectly"
        spread.append((str(gpus), *(_short(cost.hours) for cost in rows), note))
    images = recipe.images * sum(recipe.epochs.values())
    notes = [
        f"{recipe.name}: {images:,} images in {sum(recipe.epochs.values())} epochs"
        f" ({recipe.images:,} an epoch, {recipe.source})",
        f"measured with {settings['batch']} images a step, {settings['dtype']}, on one {machine};"
        " a step is as slow as its loader where that is slower",
    ]
    if settings["peak_tflops"] is None:
        notes.append("share of peak: unknown, no peak of this machine in this precision is known")
    if settings["watts"] is None:
        notes.append("energy: unknown, no NVML here (pip install slotstream[power], or --watts)")
    else:
        notes.append(
            f"energy: of the {machine}s alone, watts {settings['watts']};"
            f" CO2e at {settings['co2_g_per_kwh']:,.0f} g/kWh"
        )
    return "\n\n".join([aligned(measured), aligned(totals), aligned(spread), "\n".join(notes)])


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
