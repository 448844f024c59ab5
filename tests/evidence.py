"""Does it learn: trainings from scratch beside untrained features and raw pixels, and without two
of the method's parts, over seeds. What docs/results.md shows is made with

    python -m tests.evidence scenes WORK --jobs 2
    python -m tests.evidence camvid WORK --root CamVid --jobs 2
    python -m tests.evidence scenes LONGER --variants full --no-baselines \\
        --train "--train.epochs 12" --jobs 2

Packs, trains and scores in the folder WORK, with the commands that a user would; what is there
already is not made again, so that a stopped one goes on.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from train.run.cli import CommandParser, run
from transfer.table import mean_and_deviation

VARIANTS = {
    "full": "",
    "no grouping loss": "--model.group_loss_weight 0",
    "no geometric augmentation": "--views.geometry false",
}
STARTS = 3
"""Of k-means, for each seed of training, which has starts of its own; their mean counts."""
LEARNT = 200
"""Labelled scenes that the probes learn from."""
MEASURES = {
    "eval.json": "unsupervised_segmentation",
    "knn.json": "probe knn",
    "linear.json": "probe linear",
}
"""File and command of each measure."""
BASELINES = {"eval.json": " untrained pixels --baseline untrained"} | dict.fromkeys(
    ("knn.json", "linear.json"), " untrained pixels"
)
"""Scored beside the full method: once for each seed."""
COLUMNS = ("prototypes", "k-means", "knn", "linear")
"""Clusters of the first measure, and probes."""


@dataclass(frozen=True)
class Setting:
    """What is trained on, and what is scored."""

    config: str
    pack: str
    labelled: str
    """Options of evaluation that name the images to score, and …"""
    learnt: str
    """… those that a probe learns from."""
    size: int
    """Side of the scored square in pixels."""


def setting(data: str, work: Path, root: Path | None) -> Setting:
    """Raises UserError where CamVid's folder is not given."""
    if data == "scenes":
        scenes = work / "scenes"
        val, train = (
            f"images {scenes / part}/images --{prefix}labels {scenes / part}/labels"
            for part, prefix in (("val", ""), ("train", "train-"))
        )
        listed = work / "learnt.txt"
        listed.write_text("".join(f"{number}\n" for number in range(LEARNT)))
        learnt = f"--train-{train} --train-list {listed} --memory 20000"
        return Setting("configs/demo_cpu.yaml", "sample", f"--{val}", learnt, 192)
    if root is None:
        raise UserError("camvid needs --root, the folder with train, trainannot, val and valannot")
    labelled = f"--dataset camvid --root {shlex.quote(str(root))}"
    pack = f"folder --root {shlex.quote(str(root / 'train'))}"
    return Setting("configs/camvid_cpu.yaml", pack, labelled, "", 320)


def call(command: str, log: Path, threads: int) -> None:
    """One of slotstream's commands, its output to `log`. Raises UserError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        print(f"$ python -m {command}", file=file, flush=True)
        code = subprocess.call(
            [sys.executable, "-m", *shlex.split(command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if code:
        raise UserError(f"{log}: {command.partition(' ')[0]} ended with {code}")


def train_and_score(
    found: Setting, work: Path, variant: str, seed: int, more: str, baselines: bool, threads: int
) -> list[Path]:
    """One run, with `more` of its own options, and its scores: a file for each measure."""
    folder = work / f"{variant.replace(' ', '_')}_{seed}"
    log, files = folder.with_suffix(".log"), [folder / file for file in MEASURES]
    if all(file.is_file() for file in files):
        return files
    call(
        f"train.pretrain --config {found.config} --data.path {work}/images.beton --log.dir {work}"
        f" --name {folder.name} --train.seed {seed} --resume auto {VARIANTS[variant]} {more}",
        log,
        threads,
    )
    starts = " ".join(str(STARTS * seed + start) for start in range(STARTS))
    for file, command in MEASURES.items():
        options = (
            f"--checkpoint {folder} {found.labelled} --size {found.size} --seeds {starts}"
            f" --json {folder / file} --features teacher"
            + (BASELINES[file] if baselines and variant == "full" else "")
        )
        if command.startswith("probe"):
            options += f" {found.learnt}"
        call(f"evaluation.{command} {options}", log, threads)
    print(f"done: {variant}, seed {seed}", flush=True)
    return files


def row_of(network: str, variant: str) -> str:
    """untrained and pixels as they are; the run's own by what it was trained with."""
    own = network.removesuffix(", k-means")
    return variant if own in ("trained", "teacher") else own


def table(made: dict[tuple[str, int], list[Path]], metric: str) -> str:
    """`metric` in percent of each row and column, mean ± deviation over the seeds of training."""
    values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (variant, seed), files in made.items():
        for row in (row for file in files for row in json.loads(file.read_text())["results"]):
            name, column = row_of(row["network"], variant), row.get("clusters") or row["probe"]
            if row["metric"] == metric:
                values[name, column][seed].append(100 * row["value"])
    lines = [f"| {metric}, % | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name in [*dict.fromkeys(variant for variant, _ in made), "untrained", "pixels"]:
        seeds = [[statistics.mean(v) for v in values[name, c].values()] for c in COLUMNS]
        cells = [mean_and_deviation(means) for means in seeds]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tests.evidence", description=__doc__)
    parser.add_argument("data", choices=["scenes", "camvid"])
    parser.add_argument("work", type=Path, help="folder for everything that is made")
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--train", default="", help="further options of train.pretrain, one string")
    parser.add_argument("--no-baselines", action="store_true", help="score the runs only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores (1)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    args.work.mkdir(parents=True, exist_ok=True)
    found = setting(args.data, args.work, args.root)
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    if not (args.work / "images.beton").is_file():
        command = f"tools.build_dataset {found.pack} --out {args.work}/images.beton"
        call(command, args.work / "pack.log", threads)
    tasks = [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(
            lambda task: train_and_score(
                found, args.work, *task, args.train, not args.no_baselines, threads
            ),
            tasks,
        )
        made = dict(zip(tasks, done, strict=True))
    for metric in ("miou", "pixel_accuracy"):
        print(table(made, metric))


if __name__ == "__main__":
    run(main)
