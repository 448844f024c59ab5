"""Small training runs for tests, in this process and in others."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import ModelConfig, ModelOutput
from pipeline.views import ViewConfig
from tests.helpers.betons import varied, write_beton
from tests.helpers.forked import become_rank, forkserver, free_port
from tests.helpers.runs import in_this_process, launch_module
from train import metrics
from train.config import (
    DataConfig,
    EfficiencyConfig,
    LogConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from train.pretrain import open_evaluation
from train.run.settings import to_yaml
from train.run.signals import StopSignals
from train.trainer import Trainer

IMAGES, BATCH = 22, 4  # 5 steps an epoch, two images left over
TIMES = ("images_per_s", "wait_share", "seconds")


def small_beton(folder: Path) -> Path:
    """22 photographs of different sizes."""
    return write_beton(folder / "small.beton", varied(IMAGES))


def small_run(beton: Path, folder: Path, name: str = "run", **train: Any) -> RunConfig:
    """Two epochs of five steps. Log lines, checkpoints and epochs end at different steps."""
    return RunConfig(
        name=name,
        data=DataConfig(str(beton), threads=1),
        views=ViewConfig(size=64),
        model=ModelConfig("resnet18", stages=2, dim_hidden=16, dim_out=8, num_prototypes=8),
        train=TrainConfig(**{"epochs": 2, "batch_size": BATCH, "warmup_epochs": 1, **train}),
        efficiency=EfficiencyConfig(),
        log=LogConfig(every=3, trackers=(), checkpoint_every=4, keep=2, history=0, dir=str(folder)),
    )


def with_accumulation(config: RunConfig, count: int) -> RunConfig:
    return replace(config, efficiency=replace(config.efficiency, accumulation=count))


def trainer(
    config: RunConfig, resume: str | None = None, signals: StopSignals | None = None
) -> Trainer:
    """A trainer in this process."""
    return in_this_process(lambda: Trainer(config, resume, signals, open_evaluation))


def run_dir(config: RunConfig) -> Path:
    return Path(config.log.dir) / config.name


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    found = load_file(checkpoint / "model.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    for number, state in optimizer["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    """Equal names and equal bits."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def launch(config: RunConfig, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run `config` in new processes, with `main` below."""
    file = Path(config.log.dir) / f"{config.name}.yaml"
    file.write_text(to_yaml(config))
    return launch_module(
        "tests.helpers.training", "--config", str(file), *options, processes=processes, timeout=280
    )


def train_in_two(config: RunConfig) -> None:
    """Train `config` in two processes with `main` below, without torchrun, which would import
    everything anew three times. Both must end well.
    """
    folder = Path(config.log.dir)
    file, said = folder / f"{config.name}.yaml", folder / f"{config.name}.stderr"
    file.write_text(to_yaml(config))
    context, port = forkserver(), free_port()
    processes = [
        context.Process(target=_train_as, args=(rank, port, file, Path(f"{said}{rank}")))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
        process.kill()
    errors = [Path(f"{said}{rank}").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in processes] == [0, 0], errors


def _train_as(rank: int, port: int, file: Path, errors: Path) -> None:
    with errors.open("w") as opened:
        os.dup2(opened.fileno(), 2)
    become_rank(rank, port)
    sys.argv = ["train", "--config", str(file)]
    main()


def _kill_at(count: int) -> None:
    """End this process with SIGKILL after `count` micro-batches."""
    add, done = metrics.Meter.add, []

    def counting(meter: metrics.Meter, output: ModelOutput) -> None:
        add(meter, output)
        done.append(1)
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    metrics.Meter.add = counting  # type: ignore[method-assign,assignment]


def main() -> None:
    """Train. KILL_AT=N in the environment kills the process of rank KILL_RANK (0) after N
    micro-batches. At the end each process writes its model beside the run's folder."""
    rank = os.environ.get("RANK", "0")
    if "KILL_AT" in os.environ and rank == os.environ.get("KILL_RANK", "0"):
        _kill_at(int(os.environ["KILL_AT"]))
    config, resume = load_config()
    run = Trainer(config, resume, open_evaluation=open_evaluation)
    run.train()
    torch.save(run.slotcon.state_dict(), Path(config.log.dir) / f"{config.name}.rank{rank}")


if __name__ == "__main__":
    main()
