"""Does it learn? Trains from scratch over several seeds: the whole method, and the method without
each of two parts. Scores the runs beside untrained features and raw pixels. docs/results.md comes
from

    python -m tests.evidence scenes WORK --jobs 2
    python -m tests.evidence camvid WORK --root CamVid --jobs 2
    python -m tests.evidence scenes LONGER --variants full --no-baselines \\
        --train "--train.epochs 12" --jobs 2

Packs, trains and scores in the folder WORK, with the same commands as a user. Skips files that
exist, so a stopped run can be resumed.
"""

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.evidence.data import Setting, call, make_beton, setting
from train.run.cli import CommandParser
from transfer.table import mean_and_deviation

VARIANTS = {
    "full": "",
    "no grouping loss": "--model.group_loss_weight 0",
    "no geometric augmentation": "--views.geometry false",
}
STARTS = 3
"""Starts of k-means for each training seed; their mean counts. Each seed has other starts."""
MEASURES = {
    "eval.json": "unsupervised_segmentation",
    "knn.json": "probe knn",
    "linear.json": "probe linear",
}
"""File and command of each evaluation."""
WITH_BASELINES, WITHOUT = "teacher untrained pixels", "teacher --baseline none"
"""Features to score: of the full method, once for each seed, and of the others."""
COLUMNS = ("prototypes", "k-means", "knn", "linear")
"""Columns of the tables: the two clusterings and the two probes."""


def train_and_score(
    data: Setting, work: Path, variant: str, seed: int, more: str, baselines: bool, threads: int
) -> list[Path]:
    """Train one run, with `more` options, and score it: a file for each of MEASURES."""
    folder = work / f"{variant.replace(' ', '_')}_{seed}"
    log, files = folder.with_suffix(".log"), [folder / file for file in MEASURES]
    if all(file.is_file() for file in files):
        return files
    call(
        f"train.pretrain {data.recipe} --data.path {work}/images.beton --log.dir {work}"
        f" --name {folder.name} --train.seed {seed} --resume auto {VARIANTS[variant]} {more}",
        log,
        threads,
    )
    starts = " ".join(str(STARTS * seed + start) for start in range(STARTS))
    for file, command in MEASURES.items():
        options = (
            f"--checkpoint {folder} {data.scored} --size {data.size} --seeds {starts}"
            f" --json {folder / file} --features "
            + (WITH_BASELINES if baselines and variant == "full" else WITHOUT)
        )
        if command.startswith("probe"):
            options += f" {data.learnt}"
        call(f"evaluation.{command} {options}", log, threads)
    print(f"done: {variant}, seed {seed}", flush=True)
    return files


def row_of(network: str, variant: str) -> str:
    """The table row of a network: the variant for the run's networks, else the network's name."""
    name = network.removesuffix(", k-means")
    return variant if name in ("trained", "teacher") else name


def table(results: dict[tuple[str, int], list[Path]], metric: str) -> str:
    """`metric` in percent, mean ± deviation over the training seeds, as a Markdown table.

    `results`: the files of each (variant, seed).
    """
    values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (variant, seed), files in results.items():
        for row in (row for file in files for row in json.loads(file.read_text())["results"]):
            name, column = row_of(row["network"], variant), row.get("clusters") or row["probe"]
            if row["metric"] == metric:
                values[name, column][seed].append(100 * row["value"])
    lines = [f"| {metric}, % | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name in [*dict.fromkeys(variant for variant, _ in results), "untrained", "pixels"]:
        seeds = [[statistics.mean(v) for v in values[name, c].values()] for c in COLUMNS]
        cells = [mean_and_deviation(means) for means in seeds]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tests.evidence", description=__doc__)
    parser.add_argument("data", choices=["scenes", "camvid"])
    parser.add_argument("work", type=Path, help="folder for all files")
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--train", default="", help="more options of train.pretrain, one string")
    parser.add_argument("--no-baselines", action="store_true", help="score the runs only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores (1)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    args.work.mkdir(parents=True, exist_ok=True)
    data = setting(args.data, args.work, args.root)
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    make_beton(data, args.work, threads)
    tasks = [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(
            lambda task: train_and_score(
                data, args.work, *task, args.train, not args.no_baselines, threads
            ),
            tasks,
        )
        results = dict(zip(tasks, done, strict=True))
    for metric in ("miou", "pixel_accuracy"):
        print(table(results, metric))
