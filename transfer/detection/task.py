"""Detection and instance segmentation as a task for `transfer.trainer`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from model.encoder import Encoder
from pipeline.errors import UserError
from transfer.backbone import build_backbone
from transfer.detection.config import DetectionConfig
from transfer.detection.dataset import NO_AREA, CocoInstances, TrainingExamples, open_instances
from transfer.detection.evaluate import evaluate
from transfer.detection.model import Detector
from transfer.examples import generator
from transfer.shared import check_apart
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
        same = self.val.annotations.samefile(train.annotations)  # by choice
        if not same:
            check_apart(train.paths(), self.val.paths(), self.val.annotations)
        self.val.check_headers()
        self.config = config
        masks = config.model.masks
        self.examples = TrainingExamples(
            train, data.train_sides, data.longest_side, data.flip, masks
        )
        if _FIRST:
            for note in [*_oddities(train), *([] if same else _oddities(self.val))]:
                print(f"note: {note}", file=sys.stderr)
            for note in _left_out(train, self.val, masks):
                print(f"note: {note}", file=sys.stderr)
        encoder, self.init = build_backbone(config.init)
        assert isinstance(encoder, Encoder), "the configuration refuses others"
        self.model: nn.Module = Detector(encoder, len(train.categories), config.model)
        self.data = _identity(train, len(self.examples))
        self.scored = _identity(self.val, len(self.val.records))

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int, epoch: int) -> dict[str, Tensor]:
        """See `TrainingExamples.load`. Raises UserError."""
        return self.examples.load(index, generator(self.config.optim.seed, epoch, index))

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, list[Any]]:
        """The input of `Detector`. Images differ in size, so they are not stacked."""
        targets = [{k: v for k, v in one.items() if k != "image"} for one in examples]
        return {"images": [one["image"] for one in examples], "targets": targets}

    def evaluate(
        self, model: nn.Module, accelerator: Accelerator, predictions: Path | None = None
    ) -> list[Row]:
        """COCO's average precision on the validation split. `predictions` gets the detections as
        COCO's results, bbox.json and segm.json. Raises UserError.
        """
        data = self.config.data
        return evaluate(
            model,
            self.val,
            data.val_side,
            data.longest_side,
            accelerator,
            self.config.model.masks,
            predictions,
        )


def _oddities(source: CocoInstances) -> Iterator[str]:
    """What is odd about a set's objects."""
    if source.boxes:
        yield (
            f"{source.annotations}: {source.boxes} objects have no box: it is that of their masks"
        )
    if source.contradicting:
        yield (
            f"{source.annotations}: {source.contradicting} boxes share less than half with the"
            " bounds of their masks: are they x, y, width, height?"
        )
    if source.outside:
        yield (
            f"{source.annotations}: {source.outside} boxes reach out of their image and are cut:"
            " are they x, y, width, height?"
        )


def _left_out(train: CocoInstances, val: CocoInstances, masks: bool) -> Iterator[str]:
    """What training and scores leave out, or derive."""
    if train.dropped:
        yield f"{train.annotations}: training skips {train.dropped} objects: {NO_AREA}"
    if masks and (without := sum(int((~each.masked).sum()) for each in train.records)):
        yield (
            f"{train.annotations}: {without} of {sum(len(r.boxes) for r in train.records)} objects"
            " have no mask: they teach boxes alone"
        )
    if val.areas:
        yield (
            f"{val.annotations}: {val.areas} objects have no area: that of their masks, or"
            " else boxes, decides whether they are small, medium or large"
        )
    if masks and val.maskless:
        yield (
            f"{val.annotations}: mask AP leaves out {len(val.maskless)} of"
            f" {len(val.records)} images: objects there have no mask"
        )


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
