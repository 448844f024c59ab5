"""Runs the benchmark that the options describe; `tools.benchmark.__main__` is the command."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tools.benchmark import cost
from tools.benchmark.options import FROM_A_FILE
from tools.benchmark.picture import draw
from tools.benchmark.stages import EPOCH, STAGES, repeated
from tools.benchmark.timing import Bench
from tools.benchmark.verdict import compare, step_table, table, verdict
from tools.report.schema import Rates
from train.config import load_config
from train.run.json_file import read_json
from train.run.provenance import provenance, write_json


def compare_files(paths: Sequence[Path]) -> str:
    """The ratios between the --json files of two runs, as a table. Raises UserError."""
    what = "the --json file of a benchmark"
    first, second = (read_json(path, Rates, what=what) for path in paths)
    return compare(first, second, paths)


def measure(args: argparse.Namespace) -> None:
    """Measure, print, and write the files that the options name. Raises UserError."""
    bench, machine = prepare(args), provenance()

    def write(content: dict[str, Any]) -> None:
        content["settings"] = describe(args, bench) | content["settings"]
        content["results"] = [asdict(result) for result in bench.results]
        content["skipped"] = bench.skipped
        if args.json:
            write_json(args.json, machine | content)

    bench.keep = lambda: write({"settings": {}, "verdict": "unfinished: the command has not ended"})
    if args.stages == ["cost"]:
        write(cost.measure(bench, args))
    elif args.stages == ["tune"]:
        from tools.benchmark.tune import tune  # its loader needs libturbojpeg

        write(tune(bench, args))
    else:
        write(run_stages(args, bench, machine))


def prepare(args: argparse.Namespace) -> Bench:
    """Open the configuration and the beton, which `cost` does not need."""
    device, for_cost = torch.device(args.device), args.stages == ["cost"]
    of_recipe = for_cost or args.stages == ["tune"]
    path = args.data or (None if for_cost else "none")
    config, _ = load_config([*args.config, *(["--data.path", path] if path else [])])
    batch = 4 if device.type == "cpu" else config.train.batch_size
    batch = args.batch or (batch if of_recipe else 64)
    beton = None
    if args.data or (for_cost and Path(config.data.path).is_file()):
        from pipeline.beton import Beton
        from pipeline.image_folder import open_beton

        beton = open_beton(config.data.path) if of_recipe else Beton(config.data.path)
        beton.require_checksums()  # as training does, which decodes only the tiles that it needs
        beton = beton if of_recipe else repeated(beton, EPOCH * batch)
    return Bench(
        config=config,
        beton=beton,
        batch=batch,
        threads=tuple(sorted(set(args.threads))),
        repeats=args.repeats,
        seconds=args.seconds,
        images=args.images or 256 * max(args.threads),
        device=device,
        backends=tuple(dict.fromkeys(args.backends)),
        also=tuple(dict.fromkeys(args.also)),
        largest=args.largest_batch,
    )


def describe(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """The settings on which the figures depend, without the machine."""
    return {
        "device": bench.device.type,
        "batch": bench.batch,
        "threads": list(bench.threads),
        "size": bench.config.views.size,
        "dtype": bench.dtype_name,
        "arch": bench.config.model.arch,
        "config": " ".join(args.config),
        "data": args.data or "synthetic",
        "images": len(bench.beton) if bench.beton else bench.batch,
        "seconds": bench.seconds,
        "repeats": bench.repeats,
    }


def run_stages(args: argparse.Namespace, bench: Bench, machine: dict[str, Any]) -> dict[str, Any]:
    """Run the stages, print tables and verdict, draw; returns the entries of the --json file."""
    began = time.perf_counter()
    chosen = STAGES if "all" in args.stages else args.stages
    for stage in STAGES:
        if stage in chosen and (bench.beton or stage not in FROM_A_FILE):
            STAGES[stage](bench)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    hardware = machine["hardware"]
    conclusion = verdict(bench.results, hardware["cores"])
    print(table(bench.results))
    if steps := step_table(bench.results):
        print("\n" + steps)
    print(f"\n{conclusion}\n{time.perf_counter() - began:.0f} s of measuring")
    if args.plot:
        processor = ", ".join(hardware["gpus"]) if bench.device.type == "cuda" else hardware["cpu"]
        about = f"{processor}, {bench.cores} threads, batches of {bench.batch}"
        about += f", views of {bench.config.views.size} pixels"
        draw(bench.results, about).save(args.plot)
    return {"settings": {}, "verdict": conclusion}
