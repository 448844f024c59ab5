"""Detection and instance segmentation as a task for `transfer.trainer`."""

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.errors import UserError
from transfer.backbone import build_backbone
from transfer.detection.config import DetectionConfig
from transfer.detection.dataset import CocoInstances, TrainingExamples, open_instances
from transfer.detection.evaluate import evaluate
from transfer.detection.model import Detector
from transfer.examples import generator
from transfer.task import Row

_FIRST = os.environ.get("RANK", "0") == "0"  # only this process prints notes


class Detection:
    """A `transfer.task.Task`. Raises UserError."""

    name = "detection"

    def __init__(self, config: DetectionConfig) -> None:
        data = config.data
        train, self.val = (_open(config, split) for split in (data.train, data.val))
        if train.categories != self.val.categories:
            raise UserError(
                f"{self.val.annotations}: its categories differ from those of {train.annotations}"
            )
        if not any(len(record.boxes) for record in self.val.records):
            raise UserError(f"{self.val.annotations}: no object to score")
        self.val.check_headers()
        self.config = config
        self.examples = TrainingExamples(train, data.train_sides, data.longest_side, data.flip)
        encoder, self.init = build_backbone(config.init)
        self.model: nn.Module = Detector(encoder, len(train.categories), config.model)
        self.data = _identity(train, len(self.examples))
        self.scored = _identity(self.val, len(self.val.records))
        if self.val.derived and _FIRST:
            print(
                f"note: {self.val.annotations}: {self.val.derived} objects have no area: their"
                " masks' areas decide whether they are small, medium or large",
                file=sys.stderr,
            )
        if train.dropped and _FIRST:
            print(
                f"note: {train.annotations}: training skips {train.dropped} objects: their boxes"
                " or masks have no area within the image",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int, epoch: int) -> dict[str, Tensor]:
        """See `TrainingExamples.load`. Raises UserError."""
        return self.examples.load(index, generator(self.config.optim.seed, epoch, index))

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, list[Any]]:
        """The input of `Detector`. Images differ in size, so they are not stacked."""
        targets = [{k: v for k, v in one.items() if k != "image"} for one in examples]
        return {"images": [one["image"] for one in examples], "targets": targets}

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> list[Row]:
        """COCO's average precision on the validation split. Raises UserError."""
        data = self.config.data
        return evaluate(model, self.val, data.val_side, data.longest_side, accelerator)


def _identity(source: CocoInstances, images: int) -> dict[str, Any]:
    return {
        "dataset": "coco",
        "images": images,
        "fingerprint": source.fingerprint(),
        "classes": list(source.categories.values()),
    }


def _open(config: DetectionConfig, split: str) -> CocoInstances:
    data = config.data
    return open_instances(Path(data.root), data.annotations, data.images, split)
