"""Throughput by stage of the road from a beton to a trained step, each stage measured alone on the
same images, and which of them limits training.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.augment import BACKENDS
from pipeline.errors import UserError
from tools.benchmark import cost as benchmark_cost
from tools.benchmark.cost import CO2_PER_KWH
from tools.benchmark.picture import draw
from tools.benchmark.stages import EPOCH, FROM_A_FILE, STAGES, repeated
from tools.benchmark.step import VARIANTS
from tools.benchmark.timing import Bench
from tools.benchmark.verdict import aligned, compare, step_table, table, targets, verdict
from train.config import load_config
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m tools.benchmark all --data coco.beton --config configs/coco_r50_800ep.yaml \\
      --batch 512 --threads 16 --json h200.json --plot h200.png
  python -m tools.benchmark decode --data coco.beton --threads 1 2 4
  python -m tools.benchmark augment transfer --synthetic --batch 512 --backends kornia triton
  python -m tools.benchmark step --synthetic --config configs/coco_r50_800ep.yaml --batch 512 \\
      --also compile checkpointing --largest-batch --plot step.png
  python -m tools.benchmark cost --config coco_r50_800ep --minutes 1 --json cost.json
  python -m tools.benchmark cost --config coco_r50_800ep --config ablations/progressive_160_224
  python -m tools.benchmark --compare before.json after.json

Stages
  read      the records' bytes, from the page cache and from the disk
  decode    bare libjpeg-turbo on bytes in memory (the ceiling), the loader, which reads the same
            records and decodes them into padded canvases, the same with both crops cut on its
            threads, DALI's decoder
  params    everything random of a batch's views, on one core
  transfer  canvases to the GPU; a plain copy in the memory where views are made
  augment   both views of decoded images by each backend, then each operation with all others off
            (but crop and resize)
  step      a training step on views that are already there: the recipe written down plainly, and
            what the trainer runs; a profile of each, operators, launches, memory
  pipeline  the whole data path by each backend, cropping on the device, on the host, by DALI; then
            training from the fastest of each ("overlap"), and how long it waits for data
  cost      alone: step and loader for a minute, then hours, energy and CO2e of the whole recipe

images/s are medians; lowest and highest are those of the repeats. GB/s count what must move at
least: a record's bytes (read, pipeline), decoded pixels (decode), a canvas (transfer), crops read
and views written (augment); a plain copy counts what it reads and what it writes.
"""

MOST_THREADS = 1024  # beyond any machine; the system ends a process that asks for far more


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        epilog=EXAMPLES,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}, or all")
    parser.add_argument("--data", help="the beton to measure on")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="generated canvases instead of a beton: params, transfer, augment, step",
    )
    parser.add_argument(
        "--config",
        type=_config,
        action="append",
        help="views, model and precision of the stages: a file, or the name of one in configs/"
        " (demo_cpu); of several, a later one wins",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images in a batch (64; cost: the recipe's on a GPU, 4 on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[cores],
        help="decoding threads (all cores); of several numbers, decode is measured with each, the"
        " rest with the largest",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--also",
        nargs="+",
        choices=VARIANTS,
        default=[],
        help="efficiency settings that the step is measured with as well",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="step: find the largest batch that fits the GPU, to an eighth",
    )
    parser.add_argument("--repeats", type=int, default=5, help="after one warm-up (5)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="each repeat, of at least one batch (0.5)"
    )
    parser.add_argument(
        "--images", type=int, help="read and decoded at a time, at most (256 for each thread)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="cost: of measuring, about (1)")
    parser.add_argument(
        "--watts", type=float, help="cost: of a GPU, where nvidia-ml-py is not there to ask it"
    )
    parser.add_argument(
        "--co2-per-kwh",
        type=float,
        default=CO2_PER_KWH,
        metavar="GRAMS",
        help=f"cost: ({CO2_PER_KWH:.0f}, the world's in 2024 by the IEA's Electricity 2025)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="FILE.json", help="two runs' --json files"
    )
    args = parser.parse_args(argv)
    files = args.config or [_config("demo_cpu")]
    args.config = [word for file in files for word in ("--config", file)]
    return args


def _config(name: str) -> str:
    """The file that is meant, by its path or its bare name."""
    known = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    return str(known) if known.is_file() and not Path(name).is_file() else name


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is. Raises UserError."""
    for stage in args.stages:
        if stage not in (*STAGES, "all", "cost"):
            raise UserError(f"unknown stage {stage!r}: choose from {', '.join(STAGES)}, all, cost")
    if "cost" in args.stages:
        check_cost(args)
        return
    args.batch = 64 if args.batch is None else args.batch
    if not args.stages:
        raise UserError(f"name a stage: {', '.join(STAGES)}, or all")
    if bool(args.data) == args.synthetic:
        raise UserError("give either --data FILE.beton or --synthetic")
    needing = [stage for stage in FROM_A_FILE if stage in args.stages]
    if args.synthetic and needing:
        raise UserError(f"--synthetic has no file, which {' and '.join(needing)} would measure")
    check_numbers(args)


def check_cost(args: argparse.Namespace) -> None:
    """The same for `cost`, which stands alone. Raises UserError."""
    if args.stages != ["cost"] or args.synthetic or args.plot:
        raise UserError("cost goes without other stages, --synthetic and --plot")
    unused, usual = ("also", "backends", "images", "repeats", "seconds"), parse(["cost"])
    for name in unused:
        if getattr(args, name) != getattr(usual, name):
            raise UserError(
                f"cost: --{name} means nothing here; --minutes says how long to measure"
            )
    positive = (args.minutes, args.co2_per_kwh, 1 if args.watts is None else args.watts)
    if not all(0 < value < math.inf for value in positive):
        raise UserError("--minutes, --watts and --co2-per-kwh must be above 0")
    check_numbers(args)


def check_numbers(args: argparse.Namespace) -> None:
    """The rest of `check`: what the stages are given, and where their results go."""
    images = 1 if args.images is None else args.images
    batch = 1 if args.batch is None else args.batch
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
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot}: must end in .png")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_writable(option, path)


def prepare(args: argparse.Namespace) -> Bench:
    """Open the file and the configuration."""
    config, _ = load_config([*args.config, "--data.path", args.data or "none"])
    beton = None
    if args.data:
        from pipeline.beton import Beton

        beton = repeated(Beton(args.data), EPOCH * args.batch)
    return Bench(
        config=config,
        beton=beton,
        batch=args.batch,
        threads=tuple(sorted(set(args.threads))),
        repeats=args.repeats,
        seconds=args.seconds,
        images=args.images or 256 * max(args.threads),
        device=torch.device(args.device),
        backends=tuple(dict.fromkeys(args.backends)),
        also=tuple(dict.fromkeys(args.also)),
        largest=args.largest_batch,
    )


def describe(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Everything beside the machine that a figure depends on."""
    return {
        "device": bench.device.type,
        "batch": bench.batch,
        "threads": list(bench.threads),
        "size": bench.config.views.size,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "arch": bench.config.model.arch,
        "config": " ".join(args.config),
        "data": args.data or "synthetic",
        "images": len(bench.beton) if bench.beton else bench.batch,
        "seconds": bench.seconds,
        "repeats": bench.repeats,
    }


def measure(args: argparse.Namespace) -> None:
    """Run the stages, then table, targets and verdict, then the files."""
    bench = prepare(args)
    chosen = [s for s in STAGES if not (args.synthetic and s in FROM_A_FILE)]
    chosen = [s for s in chosen if s in args.stages or "all" in args.stages]
    began = time.perf_counter()
    for stage in chosen:
        STAGES[stage](bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    settings, machine = describe(args, bench), provenance()
    judged = targets(bench.results, settings)
    conclusion = verdict(bench.results, machine["hardware"]["cores"])
    print(table(bench.results))
    if more := step_table(bench.results):
        print("\n" + more)
    print("\n" + aligned([(t.claim, t.figure, t.state) for t in judged]))
    print(f"\n{conclusion}\n{time.perf_counter() - began:.0f} s of measuring")
    if args.json:
        content = {
            "settings": settings,
            "results": [asdict(result) for result in bench.results],
            "skipped": bench.skipped,
            "targets": [target._asdict() for target in judged],
            "verdict": conclusion,
        }
        write_json(args.json, machine | content)
    if args.plot:
        hardware = machine["hardware"]
        on = ", ".join(hardware["gpus"]) if bench.device.type == "cuda" else hardware["cpu"]
        about = f"{on}, {bench.cores} threads, batches of {bench.batch}"
        about += f", views of {settings['size']} pixels"
        draw(bench.results, about).save(args.plot)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.compare:
        if args.stages or args.data or args.synthetic:
            raise UserError("--compare measures nothing: leave out stages and --data")
        from tools.report.results import read_results

        first, second = (read_results(path) for path in args.compare)
        print(compare(first, second, args.compare))
    else:
        check(args)
        if args.stages == ["cost"]:
            benchmark_cost.measure(args)
        else:
            measure(args)


if __name__ == "__main__":
    run(main)
