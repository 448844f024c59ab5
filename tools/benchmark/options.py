"""The options of the benchmark and their checks: what --help needs, without torch."""

import argparse
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.choices import BACKENDS
from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable
from train.run.text import configuration_file

EXAMPLES = """examples:
  python -m tools.benchmark all --data coco.beton --config configs/coco_r50_800ep.yaml \\
      --batch 512 --threads 16 --json h200.json --plot h200.png
  python -m tools.benchmark decode --data coco.beton --threads 1 2 4
  python -m tools.benchmark augment transfer --synthetic --batch 512 --backends kornia triton
  python -m tools.benchmark step --synthetic --config configs/coco_r50_800ep.yaml --batch 512 \\
      --also compile checkpointing --largest-batch --plot step.png
  python -m tools.benchmark cost --config coco_r50_800ep --minutes 1 --json cost.json
  python -m tools.benchmark cost --config coco_r50_800ep --config ablations/progressive_160_224
  python -m tools.benchmark tune --config coco_r50_800ep --data coco.beton --minutes 2
  python -m tools.benchmark --compare before.json after.json

Stages
{stages}
  cost      alone: step and loader for a minute, then hours, energy and CO2e of the whole recipe
  tune      alone: training for a minute or two with other threads, crops, backends and compile;
            the best as options and as YAML. What the model sees stays

images/s are medians; lowest and highest are those of the repeats. GB/s count the bytes that must
move at least.
"""

MOST_THREADS = 1024  # enough for any machine; the system kills processes with far more
CO2_PER_KWH = 445.0
"""g CO2 a kWh: the world's electricity in 2024 (IEA, Electricity 2025, "Emissions")."""

STAGES = {
    "read": (
        "Records into memory, not decoded: from the page cache; then from the disk, unless "
        "the system ignores the advice to forget the pages. Bytes: the records'."
    ),
    "decode": (
        "Bare libjpeg-turbo on bytes in memory, the upper bound; the loader, which reads and "
        "decodes the same images into canvases; the loader that cuts both crops too, and the one "
        "that finishes both views; DALI's decoder, and with a GPU torchvision's, and how far their "
        "pixels are from libjpeg-turbo's. Bytes: the images' pixels."
    ),
    "params": (
        "All random numbers of a batch's pairs of views, on one core by Numba, as in training; "
        "if the views have masks, also without these."
    ),
    "transfer": (
        "Canvases from pinned host memory to the device; a plain copy in the memory where "
        "views are made, the upper bound of every pass over it. Bytes: the canvases'; of a "
        "copy, read and written."
    ),
    "augment": (
        "Both views of decoded images by each backend: the whole recipe; crop and resize with "
        "one operation more; normalisation of finished crops. Bytes: crops read, views "
        "written."
    ),
    "step": (
        "A training step on views that are already on the device: the plain recipe, the "
        "trainer's step and the variants of --also by turns; then parts, operators, launches "
        "and memory of each."
    ),
    "pipeline": (
        "The whole data path, from the beton to views on the device, by each backend, with "
        "crops on the device, on the host, by DALI; then training from the fastest of each, and "
        'from views that the decoding threads finish ("overlap"), and its wait for data. Bytes: '
        "the records'."
    ),
}
"""What each stage of `tools.benchmark.stages` measures."""
FROM_A_FILE = ("read", "decode", "pipeline")
"""Stages that need a beton."""
ALONE = {
    "cost": ("also", "backends", "images", "micro_batches", "repeats", "seconds"),
    "tune": ("also", "images", "largest_batch", "repeats", "seconds", "watts"),
}
"""Stages that run alone, and the options that have no effect on them."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "compile": {"efficiency": {"compile": True, "checkpointing": False}},
    "checkpointing": {"efficiency": {"checkpointing": True, "compile": False}},
    "exact": {"efficiency": {"slot_selection": "exact"}},
    "static": {"efficiency": {"slot_selection": "static"}},
    "nchw": {"efficiency": {"channels_last": False}},
    "stages-2": {"model": {"stages": 2}},
    "supervise-2-3-4": {"model": {"supervise": (2, 3, 4)}},
    "balanced": {"model": {"targets": "balanced"}},
    "cells": {"model": {"cell_loss_weight": 1.0, "cells": 4}},
    "slotmim": {
        "model": {"objective": "slotmim"},
        "views": {"mask_ratio": 0.3, "mask_ratio_spread": 0.2},
    },
    "student": {"train": {"teacher": "student", "teacher_momentum": 0.0}},
}
"""Settings that can be measured besides the configuration's, by section: of speed, of docs/fast.md,
and of docs/slotmim.md, on a ViT. Four cells are all that stage 4 has of the smallest views, of 64
pixels."""


def parse(argv: Sequence[str], description: str = "") -> argparse.Namespace:
    """The options; `config` becomes the arguments of `load_config`."""
    stages = "\n".join(
        textwrap.fill(
            text,
            width=100,
            initial_indent=f"  {name:10}",
            subsequent_indent=" " * 12,
        )
        for name, text in STAGES.items()
    )
    parser = CommandParser(
        prog="python -m tools.benchmark",
        description=description,
        epilog=EXAMPLES.format(stages=stages),
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}, all; cost, tune"
    )
    _add_subject(parser)
    _add_extent(parser)
    _add_cost(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="FILE.json",
        help="print the ratios between the --json files of two runs",
    )
    args = parser.parse_args(argv)
    files = args.config or [configuration_file("scenes_cpu")]
    args.config = [word for file in files for word in ("--config", file)]
    return args


def _add_subject(parser: CommandParser) -> None:
    """Options that choose the data, the model and the machine."""
    parser.add_argument("--data", help="the beton to measure on (tune: or a folder of images)")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="generated canvases instead of a beton: params, transfer, augment, step",
    )
    parser.add_argument(
        "--config",
        type=configuration_file,
        action="append",
        help="views, model and precision: a file, or the name of a file in configs/ (scenes_cpu);"
        " a later file overrides an earlier one",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images in a batch (64; cost, tune: the recipe's on a GPU, 4 on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[len(os.sched_getaffinity(0))],
        help="decoding threads (all cores); decode is measured with each of several numbers, all"
        " other stages with the largest",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--also",
        nargs="+",
        choices=VARIANTS,
        default=[],
        help="step: also measure it with each of these settings; stages-2 to student: docs/fast.md;"
        " slotmim: on a ViT",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(the GPU, if there is one)")


def _add_extent(parser: CommandParser) -> None:
    """Options that choose the length of the measurement."""
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="step: find the largest batch that fits the GPU, to an eighth",
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats after one warm-up (5)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="length of a repeat, at least one batch (0.5)"
    )
    parser.add_argument(
        "--images",
        type=int,
        help="largest number of images read and decoded at a time (256 for each thread)",
    )


def _add_cost(parser: CommandParser) -> None:
    parser.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        help="cost, tune: length of the measurement, about (1)",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        metavar="N",
        help="tune: also try efficiency.accumulation with these numbers, which change the batch "
        "statistics",
    )
    parser.add_argument(
        "--watts", type=float, help="cost: power of a GPU, if nvidia-ml-py is missing"
    )
    parser.add_argument(
        "--co2-per-kwh",
        type=float,
        default=CO2_PER_KWH,
        metavar="GRAMS",
        help=f"cost: CO2 of electricity ({CO2_PER_KWH:.0f}: the world's in 2024, by the IEA's"
        " Electricity 2025)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be measured, before the first measurement. Raises UserError."""
    for stage in args.stages:
        if stage not in (*STAGES, "all", *ALONE):
            known = ", ".join(STAGES)
            raise UserError(f"unknown stage {stage!r}: choose from {known}, all, cost, tune")
    alone = next((stage for stage in ALONE if stage in args.stages), None)
    if alone:
        check_alone(args, alone)
    elif not args.stages:
        raise UserError(f"name a stage: {', '.join(STAGES)}, or all")
    elif bool(args.data) == args.synthetic:
        raise UserError("give either --data FILE.beton or --synthetic")
    needing = [stage for stage in FROM_A_FILE if stage in args.stages]
    if args.synthetic and needing:
        raise UserError(f"--synthetic has no file, which {' and '.join(needing)} would measure")
    check_numbers(args)
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot}: must end in .png")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_writable(option, path)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse impossible amounts, and work that needs a GPU; choose the device if none is given.
    Raises UserError.
    """
    if args.micro_batches and (args.stages != ["tune"] or min(args.micro_batches) < 1):
        raise UserError("--micro-batches is for tune, and must be at least 1")
    import torch  # a second, which --help does not wait for

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    images, batch = (1 if n is None else n for n in (args.images, args.batch))
    if min(batch, *args.threads, args.repeats, images) < 1 or not 0 < args.seconds < math.inf:
        raise UserError(
            "--batch, --threads, --repeats and --images must be at least 1, --seconds above 0"
        )
    if max(args.threads) > MOST_THREADS:
        raise UserError(f"--threads: at most {MOST_THREADS}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here")
    if args.device == "cpu" and args.largest_batch:
        raise UserError("--largest-batch: needs a GPU, whose memory it fills")
    if args.device == "cpu" and args.backends == ["triton"]:
        raise UserError("--backends triton: needs a GPU; the interpreter is for tests only")


def check_alone(args: argparse.Namespace, stage: str) -> None:
    """Refuse options that do not apply to cost or tune. Raises UserError."""
    if args.stages != [stage] or args.synthetic or args.plot:
        raise UserError(f"{stage} cannot be combined with other stages, --synthetic or --plot")
    usual = parse([stage])
    for name in ALONE[stage]:
        if getattr(args, name) != getattr(usual, name):
            raise UserError(
                f"{stage}: --{name.replace('_', '-')} has no effect here; --minutes sets the length"
                " of the measurement"
            )
    if stage == "tune" and not args.data:
        raise UserError("tune needs --data, a beton or a folder of images")
    positive = (args.minutes, args.co2_per_kwh, 1 if args.watts is None else args.watts)
    if not all(0 < value < math.inf for value in positive):
        raise UserError("--minutes, --watts and --co2-per-kwh must be above 0")
