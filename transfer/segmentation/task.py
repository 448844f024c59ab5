"""Semantic segmentation as a task for `transfer.trainer`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.errors import UserError
from transfer.backbone import build_backbone
from transfer.examples import generator
from transfer.segmentation.augment import augment
from transfer.segmentation.config import SegmentationConfig
from transfer.segmentation.dataset import fingerprint, open_sets
from transfer.segmentation.evaluate import confusion_of, examples, score_rows
from transfer.segmentation.model import FCN
from transfer.segmentation.predictions import LabelWriter
from transfer.task import Row

_FIRST = os.environ.get("RANK", "0") == "0"  # only this process prints notes

Example = tuple[np.ndarray, np.ndarray]
"""Pixels uint8 [S, S, 3], labels uint8 [S, S]."""


class Segmentation:
    """A `transfer.task.Task`. Raises UserError if a data set or the weights cannot be used."""

    name = "segmentation"

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        self.train, self.val = open_sets(config.data)
        for note in self.val.notes() if _FIRST else ():
            print(f"note: {note}", file=sys.stderr)
        encoder, self.init = build_backbone(config.init)
        try:
            self.model: nn.Module = FCN(encoder, self.train.num_classes, config.model)
        except ValueError as error:  # of a network that cannot be dilated
            raise UserError(f"model.output_stride: {error}") from None
        self.data, self.scored = (
            {
                "dataset": config.data.dataset,
                "images": len(part),
                "fingerprint": fingerprint(part),
                "classes": part.names,
            }
            for part in (self.train, self.val)
        )
        torch.backends.cudnn.benchmark = True  # all crops have the same size

    def __len__(self) -> int:
        return len(self.train)

    def example(self, index: int, epoch: int) -> Example:
        pixels = self.train.load(index)
        labels = self.train.labels(index, *pixels.shape[:2])
        draws = generator(self.config.optim.seed, epoch, index)
        return augment(pixels, labels, self.config.augment, draws)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """{"pixels": uint8 [B, S, S, 3], "labels": uint8 [B, S, S]}"""
        pixels, labels = zip(*examples, strict=True)
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "labels": torch.from_numpy(np.stack(labels)),
        }

    def evaluate(
        self, model: nn.Module, accelerator: Accelerator, predictions: Path | None = None
    ) -> list[Row]:
        """Score the validation set, one image at a time, because sizes differ. The confusion
        matrices of all processes are added. `predictions` gets a label PNG of each image.
        """
        assert isinstance(model, FCN)
        indices = range(accelerator.process_index, len(self.val), accelerator.num_processes)
        threads = max(1, self.config.efficiency.workers)
        share = examples(self.val, indices, self.config.augment.size, threads)
        keep = LabelWriter(predictions, self.val) if predictions else None
        with _without_benchmark():
            confusion = confusion_of(
                model, share, self.val.num_classes, self.config.inference, accelerator.device, keep
            )
        on_device = torch.from_numpy(confusion).to(accelerator.device)
        total: Tensor = accelerator.reduce(on_device, reduction="sum")
        return score_rows(total.cpu().numpy(), self.val.names or [])


@contextmanager
def _without_benchmark() -> Iterator[None]:
    """cuDNN does not try all algorithms: that is slow for images of many sizes."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
