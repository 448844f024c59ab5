"""The cost of a whole recipe on this machine: measure step and loader, multiply, print.

The step is measured at every size of the recipe's views, plain and fast. Hours, energy and CO2e of
the recipe follow from these rates.
"""

import math
import statistics
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

from pipeline.errors import UserError
from tools.benchmark.stages import EPOCH, batches, repeated
from tools.benchmark.step import gflop_of, step_works, take_a_step, ways_of
from tools.benchmark.timing import Bench, Work
from tools.benchmark.verdict import aligned
from train.config import RunConfig
from train.run.provenance import hardware

GPUS = (1, 2, 4, 8, 16, 32, 64)
IMAGES = {"coco": 118_287, "cocoplus": 241_690, "imagenet": 1_281_167}
"""Images of the recipes' sets, by the beton's name: used where the beton is missing."""
REPEATS = 3
POWER_SECONDS = 3.0

PEAKS = (
    ("H200", 989.4), ("GH200", 989.4), ("H100 PCIe", 756.4), ("H100 NVL", 835.5), ("H100", 989.4),
    ("A100", 311.9), ("L40S", 362.1), ("V100", 125.0), ("T4", 65.1),
)  # fmt: skip
"""Parts of a GPU's name and its dense fp16 and bf16 TFLOP/s on tensor cores, from NVIDIA's data
sheets (half of the figures with sparsity). The first match counts."""


@dataclass(frozen=True)
class Size:
    """A size of the views, and the measurements with it."""

    side: int
    epochs: int
    gflop: float
    """Of an image: two views, student forward and backward, teacher forward."""
    images_per_s: dict[str, float]
    """By backend, of the step alone."""
    loader: float | None
    """images/s on this machine; None without a beton."""
    watts: dict[str, float]
    """By backend, of one GPU; empty if they cannot be measured."""


class Recipe(NamedTuple):
    """The amount of training in a recipe."""

    name: str
    images: int
    """Per epoch, without the dropped last batch."""
    source: str
    """The source of that number."""
    epochs: dict[int, int]
    """By the views' side."""


def recipe_of(config: RunConfig, beton_images: int | None) -> Recipe:
    """Raises UserError if the number of images is unknown."""
    stem = Path(config.data.path).stem
    count = beton_images or IMAGES.get(stem)
    if count is None:
        raise UserError(f"cost: {config.data.path} does not exist; how many images? Give --data")
    whole = count // config.train.batch_size * config.train.batch_size
    source = "the beton's" if beton_images else f"those of {stem}, whose beton is missing"
    epochs = Counter(config.view_size(epoch) for epoch in range(config.train.epochs))
    return Recipe(config.name, whole, source, dict(epochs))


def costs(
    recipe: Recipe, sizes: Sequence[Size], peak: float | None, co2_per_kwh: float, loaders: int = 1
) -> list[dict[str, Any]]:
    """Each backend on each number of `GPUS`, from the rates of one GPU. "measured" is false if the
    row assumes perfect scaling.

    `peak` in TFLOP/s; `co2_per_kwh` in g; `loaders`: GPUs that share the measured loader.
    """
    rows = []
    for backend in sizes[0].images_per_s:
        seconds = flop = joules = 0.0
        for size in sizes:
            images = recipe.images * size.epochs
            loader = size.loader / loaders if size.loader else math.inf
            spent = images / min(size.images_per_s[backend], loader)
            seconds += spent
            flop += images * size.gflop * 1e9
            joules += spent * size.watts.get(backend, math.nan)
        kwh = None if math.isnan(joules) else joules / 3.6e6
        rows += [
            {
                "backend": backend,
                "gpus": gpus,
                "measured": gpus == 1,
                "images_per_s": gpus * recipe.images * sum(recipe.epochs.values()) / seconds,
                "share_of_peak": flop / seconds / (peak * 1e12) if peak else None,
                "hours": seconds / gpus / 3600,
                "gpu_hours": seconds / 3600,
                "kwh": kwh,
                "co2_kg": None if kwh is None else kwh * co2_per_kwh / 1e3,
            }
            for gpus in GPUS
        ]
    return rows


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a GPU in half precision; None for other GPUs and types."""
    if dtype == torch.float32:
        return None
    return next((peak for part, peak in PEAKS if part in name), None)


# ---- Measure ----


def measure(bench: Bench, args: Namespace) -> dict[str, Any]:
    """Measure for about `--minutes`, print, return the entries of the --json file."""
    recipe = recipe_of(bench.config, len(bench.beton) if bench.beton else None)
    if bench.beton:
        bench.beton = repeated(bench.beton, EPOCH * bench.batch)
    bench.repeats = REPEATS
    pieces = len(recipe.epochs) * (2 + (bench.beton is not None))
    bench.seconds = 60 * args.minutes / (pieces * (REPEATS + 2))
    sizes = [_measure_size(bench, side, epochs) for side, epochs in recipe.epochs.items()]
    if args.watts:
        sizes = [replace(s, watts=dict.fromkeys(s.images_per_s, args.watts)) for s in sizes]
    gpus = hardware()["gpus"]
    peak = peak_of(gpus[0], bench.dtype) if bench.device.type == "cuda" else None
    rows = costs(recipe, sizes, peak, args.co2_per_kwh, max(1, len(gpus)))
    settings = {
        "data": bench.config.data.path if bench.beton else None,
        "minutes": args.minutes,
        "co2_g_per_kwh": args.co2_per_kwh,
        "watts": "given" if args.watts else "NVML" if sizes[0].watts else None,
        "peak_tflops": peak,
        "recipe": recipe._asdict(),
    }
    print(report(bench, recipe, sizes, rows, settings))
    return {"settings": settings, "sizes": [asdict(size) for size in sizes], "cost": rows}


def _measure_size(bench: Bench, side: int, epochs: int) -> Size:
    """The plain and the fast step by turns, then the loader, on views of `side` pixels.

    The copy of `bench` for this size appends to the same results.
    """
    config = replace(
        bench.config,
        views=replace(bench.config.views, size=side),
        train=replace(bench.config.train, view_sizes=()),
    )
    sized, label = replace(bench, config=config), f"{side} pixels"
    ways = step_works(sized, ways_of(config))
    works = [replace(work, operation=label) for work in ways]
    for work in works:
        take_a_step(work.call)
    rows = sized.measure(works, ratio_to="plain")
    power = {work.backend: watts(work.call, bench.device) for work in works}
    return Size(
        side=side,
        epochs=epochs,
        gflop=gflop_of(config, side),
        images_per_s={row.backend: row.images_per_s for row in rows},
        loader=_loader(sized, label) if bench.beton else None,
        watts={name: value for name, value in power.items() if value is not None},
    )


def _loader(bench: Bench, label: str) -> float:
    """images/s of the configuration's data path."""
    from pipeline.loader import choose

    data, batch = bench.config.data, bench.batch
    backend, crops = choose(data.backend, data.crops, bench.device)
    with closing(batches(bench, backend, crops, batch)) as stream:
        work = Work(
            "pipeline", backend, partial(next, stream), batch, batch, bench.cores,
            operation=label, crops=crops,
        )  # fmt: skip
        return bench.measure([work])[0].images_per_s


def watts(call: Callable[[], object], device: torch.device) -> float | None:
    """Mean power of the GPU while `call` is repeated, by NVML; None without it."""
    if device.type != "cuda" or _power(device) is None:
        return None
    ended, samples = threading.Event(), list[float]()

    def sample() -> None:
        while not ended.wait(0.05) and (now := _power(device)) is not None:
            samples.append(now)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    threading.Timer(POWER_SECONDS, ended.set).start()
    while not ended.is_set():
        call()
        torch.cuda.synchronize(device)
    thread.join()
    return statistics.fmean(samples) if samples else None


def _power(device: torch.device) -> float | None:
    """Watts at this moment, or None: no NVML, no driver, or a GPU that does not say (a MIG part,
    for example).
    """
    try:
        from pynvml import NVMLError
    except ImportError:
        return None
    try:
        return torch.cuda.power_draw(device) / 1e3
    except (NVMLError, RuntimeError):
        return None


# ---- Print ----


def report(
    bench: Bench,
    recipe: Recipe,
    sizes: Sequence[Size],
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
) -> str:
    """Three tables: rates by size, the whole recipe, hours by GPUs; then their assumptions."""
    backends = list(sizes[0].images_per_s)
    machine = "GPU" if bench.device.type == "cuda" else "CPU"
    rates = [
        ("pixels", "epochs", "GFLOP/image", *(f"{b} images/s" for b in backends),
         "loader images/s", *(f"{b} W" for b in backends)),
    ]  # fmt: skip
    rates += [
        (
            str(size.side),
            str(size.epochs),
            f"{size.gflop:,.1f}",
            *(f"{size.images_per_s[b]:,.1f}" for b in backends),
            f"{size.loader:,.1f}" if size.loader else "not measured",
            *(f"{size.watts[b]:,.0f}" if b in size.watts else "unknown" for b in backends),
        )
        for size in sizes
    ]
    totals = [("whole recipe", "images/s", "of peak", f"{machine}-hours", "kWh", "kg CO2e")]
    hours = [(f"{machine}s", *(f"{b} hours" for b in backends), "")]
    for row in (row for row in rows if row["measured"]):
        share = "unknown" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
        spent = (_short(row[name]) for name in ("gpu_hours", "kwh", "co2_kg"))
        totals.append((row["backend"], f"{row['images_per_s']:,.1f}", share, *spent))
    for gpus in GPUS:
        note = "from measured rates" if gpus == 1 else "if it scaled perfectly"
        spent = (_short(row["hours"]) for row in rows if row["gpus"] == gpus)
        hours.append((str(gpus), *spent, note))
    tables = [aligned(table) for table in (rates, totals, hours)]
    return "\n\n".join([*tables, _notes(bench, recipe, settings, machine)])


def _notes(bench: Bench, recipe: Recipe, settings: dict[str, Any], machine: str) -> str:
    epochs = sum(recipe.epochs.values())
    notes = [
        f"{recipe.name}: {recipe.images * epochs:,} images in {epochs} epochs"
        f" ({recipe.images:,} an epoch, {recipe.source})",
        f"measured with {bench.batch} images a step, {bench.dtype_name}, on one {machine};"
        " where the loader is slower than the step, the loader's rate counts",
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
    return "\n".join(notes)


def _short(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
