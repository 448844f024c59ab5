"""What is trained on and scored: the sample scenes, or CamVid's photographs; running a command."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

TRAIN_SCENES = 200
"""Labelled scenes that the probes learn from."""


@dataclass(frozen=True)
class Setting:
    """The data to train on and to score."""

    recipe: str
    """Options of train.pretrain: close to the authors', but small."""
    pack: str
    """Options of tools.build_dataset."""
    scored: str
    """Options that name the labelled images to score."""
    learnt: str
    """Options that name the labelled images that a probe learns from."""
    size: int
    """Side of the scored square in pixels."""


def setting(data: str, work: Path, root: Path | None) -> Setting:
    """The setting "scenes" or "camvid". Raises UserError if CamVid's folder is not given."""
    if data == "scenes":
        scenes = work / "scenes"
        val, train = (
            f"images {scenes / part}/images --{prefix}labels {scenes / part}/labels"
            for part, prefix in (("val", ""), ("train", "train-"))
        )
        listed = work / "learnt.txt"
        listed.write_text("".join(f"{number}\n" for number in range(TRAIN_SCENES)))
        learnt = f"--train-{train} --train-list {listed} --memory 20000"
        return Setting("--config configs/scenes_cpu.yaml", "sample", f"--{val}", learnt, 192)
    if root is None:
        raise UserError("camvid needs --root, the folder with train, trainannot, val and valannot")
    scored = f"--dataset camvid --root {shlex.quote(str(root))}"
    pack = f"folder --root {shlex.quote(str(root / 'train'))}"
    return Setting("--config configs/camvid_cpu.yaml", pack, scored, "", 320)


def make_beton(data: Setting, work: Path, threads: int) -> None:
    """Pack the images to WORK/images.beton, unless that exists."""
    if not (work / "images.beton").is_file():
        command = f"tools.build_dataset {data.pack} --out {work}/images.beton"
        call(command, work / "pack.log", threads)


def call(command: str, log: Path, threads: int) -> float:
    """Run a command of slotstream with its output in `log`; returns the seconds it has computed
    on all cores. Raises UserError if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        print(f"$ python -m {command}", file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{log}: {command.partition(' ')[0]} ended with {process.returncode}")
    return usage.ru_utime
