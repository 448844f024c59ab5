"""Quality against operations: the recipe that is close to the authors', the fast one, a control,
and SlotMIM at equal budgets of FLOPs, each read at stages 2, 3 and 4, all of them joined, and
whitened.

    python -m tests.evidence curves camvid WORK --root CamVid --budgets 6 12 --seeds 0 1 2

A budget counts the steps' operations as `tools.benchmark` does. Epochs follow from it, rounded; so
do warm-up and cosine. Trains and scores in WORK by the commands of a user, the first seed of each
budget first. Skips what exists; prints tables of what there is, and draws it to WORK/curves.png.
"""

import argparse
import functools
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.beton import Beton
from pipeline.order import steps_per_epoch
from tests.evidence.curve_tables import tables
from tests.evidence.data import Setting, call, make_beton, setting
from tests.evidence.scores import missing
from tools.benchmark.step import gflop_of
from train.config import load_config
from train.run.cli import CommandParser

FAST = "--config configs/fast/camvid_cpu.yaml"
STAGE_2 = "--model.stages 2 --model.supervise [] --model.stage_sizes [] --model.cells 32"
PATH = 160
"""Peak learning rate times steps of the fast recipe: docs/fast.md."""
MEMORY = 16_000
"""Cells that the probes learn from: all that stage 4 has of CamVid."""
RECIPES = ("fast", "control", "today", "slotmim")
LEAST, MOST = 0.75, 1.25
"""A run of whole epochs that is not within these shares of its budget is left out."""


@dataclass(frozen=True)
class Run:
    """A run whose FLOPs are about a budget."""

    recipe: str
    seed: int
    budget: float
    """TFLOP that it should take."""
    tflop: float
    """TFLOP that it takes."""
    steps: int
    peak: float
    """The highest learning rate."""
    options: str
    """Of train.pretrain."""

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.budget:g}_{self.seed}"


def options_of(recipe: str, data: Setting) -> str:
    """Those of `recipe`, but for its length and its learning rate.

    fast: losses at stages 2, 3 and 4; the rate follows from PATH. control: the stages up to the
    second alone, in the batches and at the rate of configs/fast/scenes_cpu.yaml, which are the best
    known for them. slotmim: a ViT by the recipe of the same name in configs/slotmim.
    """
    return {
        "today": data.recipe,
        "fast": FAST,
        "control": f"{FAST} {STAGE_2} --train.batch_size 16 --train.base_lr 32",
        "slotmim": data.recipe.replace("configs/", "configs/slotmim/"),
    }[recipe]


def baseline_of(recipe: str, seed: int) -> str:
    """The folder of the network that the recipe's runs with this seed start from."""
    return f"untrained-vit_{seed}" if recipe == "slotmim" else f"untrained_{seed}"


@functools.cache
def planned(recipe: str, seed: int, budget: float, data: Setting, beton: Path) -> Run | None:
    """The run that comes closest to the budget; None if it is far from it."""
    options = f"{options_of(recipe, data)} --data.path {beton}"
    config, _ = load_config(options.split())
    train = config.train
    a_step = gflop_of(config, config.views.size) * train.batch_size / 1e3
    each = steps_per_epoch(Beton(beton), train.batch_size, 1, 1)
    epochs = max(round(budget / (each * a_step)), 1)
    tflop, warmup = epochs * each * a_step, train.warmup_epochs / train.epochs * epochs
    if not LEAST < tflop / budget < MOST:
        return None
    peak = train.base_lr * train.batch_size / 256
    if recipe == "fast":
        peak = PATH / (epochs * each)
    options += f" --train.epochs {epochs} --train.warmup_epochs {warmup:.4g} --train.seed {seed}"
    options += f" --train.base_lr {peak * 256 / train.batch_size:.6g}"
    return Run(recipe, seed, budget, tflop, epochs * each, peak, options)


def train_run(run: Run, data: Setting, work: Path) -> Path:
    """Train, and write the facts of the run to run.json, last. Returns its folder."""
    folder = work / run.name
    if (folder / "facts.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    log = work / f"{run.name}.log"
    trained = work / f"{run.name}_trunk" if run.recipe == "control" else folder
    shutil.rmtree(trained, ignore_errors=True)
    seconds = call(
        f"train.pretrain {run.options} --name {trained.name} --log.dir {work} --data.threads 1"
        " --log.checkpoint_every 0 --log.trackers []",
        log,
        threads=1,
    )
    if run.recipe == "control":
        command = f"tests.evidence.control {trained} {folder} {work}/images.beton {data.size}"
        call(command, log, threads=1)
    facts = asdict(run) | {"cpu_seconds": seconds}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def score(folder: Path, network: str, data: Setting, log: Path) -> None:
    """Write the files of scores that FOLDER lacks; a baseline's network is that of the run beside
    its folder."""
    if not missing(folder):
        return
    options = f"--size {data.size} {data.scored} {data.learnt} --memory {MEMORY}"
    options += f" --features {network}"
    run = folder if network == "teacher" else (folder / "of").read_text()
    call(f"tests.evidence.scores {folder} --checkpoint {run} {options}", log, threads=1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tests.evidence curves", description=__doc__)
    parser.add_argument("data", choices=["scenes", "camvid"])
    parser.add_argument("work", type=Path, help="folder for all files")
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[6, 12, 3, 25, 50], help="TFLOP of a run"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--only-print", action="store_true", help="tables of what there is")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if not args.only_print:
        train_and_score(args)
    print(tables(args.data, args.work))


def train_and_score(args: argparse.Namespace) -> None:
    """The runs that WORK lacks, and their baselines."""
    args.work.mkdir(parents=True, exist_ok=True)
    data = setting(args.data, args.work, args.root)
    make_beton(data, args.work, threads=1)
    for budget in args.budgets:
        for seed in args.seeds:
            for recipe in args.recipes:
                run = planned(recipe, seed, budget, data, args.work / "images.beton")
                if run is None:
                    print(f"{recipe}: no whole epochs make about {budget:g} TFLOP", flush=True)
                    continue
                folder = train_run(run, data, args.work)
                score(folder, "teacher", data, args.work / f"{run.name}.log")
                baseline = args.work / baseline_of(recipe, seed)
                if not baseline.exists():
                    baseline.mkdir()
                    (baseline / "of").write_text(str(folder))
                score(baseline, "untrained", data, args.work / f"{run.name}.log")
                print(f"done: {run.name}", flush=True)
