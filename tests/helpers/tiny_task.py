"""A task of generated images, for tests of transfer's trainer in this process and in others."""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from tests.helpers.runs import in_this_process, launch_module
from train.run.settings import to_yaml
from train.run.signals import StopSignals
from transfer.command import run_task, settings_of
from transfer.config import EfficiencyConfig, LogConfig, OptimConfig, TransferConfig
from transfer.examples import generator
from transfer.task import Row
from transfer.trainer import Trainer

IMAGES, BATCH, HELD_OUT = 22, 4, 7  # 5 steps an epoch, two images left over
NAMES = ("red", "green", "blue")
CLASSES = len(NAMES)


@dataclass(frozen=True)
class DataConfig:
    """Images that are bright in one channel, which is their class; and faults of the images."""

    root: str = ""
    """The folder of the images (there is none)."""
    unreadable: int = -1
    """The index of an image that cannot be read."""
    lethal: int = -1
    """The index of an image that kills the process that reads it."""
    nan_epoch: int = -1
    """From this epoch on all images are NaN."""


@dataclass(frozen=True)
class ModelConfig:
    """Two convolutions."""

    norm: bool = True
    """BatchNorm."""
    dropout: float = 0.2
    """Share of the features that the head does not see."""


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TransferConfig):
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""


class Classifier(nn.Module):
    """Images [B, 3, 8, 8] → a loss in training mode, logits [B, CLASSES] otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=not config.norm),
            nn.BatchNorm2d(8) if config.norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(config.dropout),
        )
        self.head = nn.Linear(8, CLASSES)
        self.forwards = 0

    def forward(self, batch: dict[str, Tensor]) -> Any:
        logits = self.head(self.features(batch["image"]))
        if not self.training:
            return logits
        self.forwards += 1
        if self.forwards == int(os.environ.get("STOP_AT", "0")):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.forwards == int(os.environ.get("RENAME_AT", "0")) and not int(os.environ["RANK"]):
            Path(os.environ["RUN_DIR"]).rename(os.environ["RUN_DIR"] + ".moved")
        loss = F.cross_entropy(logits, batch["label"])
        return {"class": loss, "size": 0.01 * logits.square().mean()}


class TinyTask:
    """Classify images by their bright channel."""

    name = "classification"

    def __init__(self, config: TinyConfig) -> None:
        self.config = config
        self.model: nn.Module = Classifier(config.model)
        self.init = {"weights": config.init.weights, "kind": "random", "arch": "tiny"}
        self.data, self.scored = (
            {"dataset": "bright", "images": n, "fingerprint": "0" * 64, "classes": list(NAMES)}
            for n in (IMAGES, HELD_OUT)
        )

    def __len__(self) -> int:
        return IMAGES

    def example(self, index: int, epoch: int) -> dict[str, Tensor]:
        data = self.config.data
        if index == data.unreadable:
            raise UserError(f"image {index}: cannot be read")
        if index == data.lethal:
            os.kill(os.getpid(), signal.SIGKILL)
        draws = generator(self.config.optim.seed, epoch, index)
        image = draws.normal(size=(3, 8, 8)).astype(np.float32)
        image[index % CLASSES] += np.nan if 0 <= data.nan_epoch <= epoch else 1
        return {"image": torch.from_numpy(image), "label": torch.tensor(index % CLASSES)}

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> list[Row]:
        assert not model.training and not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") == (self.config.efficiency.precision != "no")
        rank, world = accelerator.process_index, accelerator.num_processes
        share = range(IMAGES + rank, IMAGES + HELD_OUT, world)
        batch = self.collate([self.example(index, 1000) for index in share])
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        right = (model(batch).argmax(dim=1) == batch["label"]).sum()
        counts = accelerator.gather(torch.stack([right, torch.full_like(right, len(share))])[None])
        total, seen = counts.sum(dim=0).tolist()
        assert seen == HELD_OUT
        return [
            {"metric": "accuracy", "value": total / seen},
            {"metric": "accuracy", "value": 1.0, "class": "red"},
        ]


def tiny_config(folder: Path, name: str = "run", **optim: Any) -> TinyConfig:
    """Three epochs of five steps. Log lines, checkpoints and epochs end at different steps."""
    settings = {"steps": 15, "batch_size": BATCH, "lr": 0.05, "seed": 3, **optim}
    return TinyConfig(
        name=name,
        optim=OptimConfig(**settings),
        efficiency=EfficiencyConfig(workers=0),
        log=LogConfig(every=3, checkpoint_every=4, dir=str(folder)),
    )


def trainer(
    config: TinyConfig, resume: str | None = None, signals: StopSignals | None = None
) -> Trainer:
    """A trainer in this process."""
    return in_this_process(
        lambda: Trainer(config, TinyTask, settings_of(TinyConfig), resume, signals)
    )


def command(argv: list[str] | None = None) -> None:
    """The command of this task."""
    run_task(
        TinyConfig, TinyTask, "tests.helpers.tiny_task", "Learn nothing much.", "examples:", argv
    )


def launched(
    config: TinyConfig, *options: str, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in new processes."""
    file = Path(config.log.dir) / f"{config.name}.yaml"
    file.write_text(to_yaml(config))
    return launch_module(
        "tests.helpers.tiny_task", "--config", str(file), *options,
        processes=processes, timeout=120, **environment,
    )  # fmt: skip


if __name__ == "__main__":
    command()
