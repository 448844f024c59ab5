"""Score a network on whole images, at the size of their label maps: one confusion matrix.

Letters: B images, C classes, H W an image's height and width, h w the resized image's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.confusion import confusion_matrix
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.segment import assign
from pipeline.errors import UserError, printable
from pipeline.parallel import ordered_map
from transfer.segmentation.augment import fit, resize
from transfer.segmentation.config import InferenceConfig
from transfer.segmentation.model import FCN
from transfer.task import Row

Scores = Callable[[Tensor], Tensor]
"""Pixels uint8 [B, H, W, 3] → logits float32 [B, C, H, W]."""


@dataclass(frozen=True)
class Example:
    """An image to score."""

    pixels: Tensor
    """uint8 [h, w, 3] of the resized image."""
    labels: np.ndarray
    """uint8 [H, W] of the stored image; 255 is void."""
    index: int
    """The image's number in its set."""
    path: Path
    """The image's file, for messages."""


def examples(
    data: LabelledImages, indices: Sequence[int], size: tuple[int, int], threads: int
) -> Iterator[Example]:
    """The images `indices` in this order, each resized to fit into `size`. `threads` read ahead.

    Raises UserError.
    """

    def load(i: int) -> Example:
        pixels = data.load(i)
        resized = resize(pixels, fit(pixels.shape, size))
        labels = data.labels(i, *pixels.shape[:2])
        return Example(torch.from_numpy(resized.copy()), labels, i, data.paths[i])

    return ordered_map(load, indices, threads)


def slide(scores: Scores, pixels: Tensor, window: int, stride: int) -> Tensor:
    """Pixels uint8 [B, H, W, 3] → logits float32 [B, C, H, W]: for each pixel, the mean over all
    windows that cover it. The last window of a row or column ends at the image's border.
    """
    height, width = pixels.shape[1:3]
    total: Tensor | None = None
    count = torch.zeros(height, width, device=pixels.device)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            part = slice(top, top + window), slice(left, left + window)
            logits = scores(pixels[:, *part])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, *part] += logits
            count[part] += 1
    assert total is not None
    return total / count


def starts(side: int, window: int, stride: int) -> list[int]:
    """The first pixels of the windows that cover `side` pixels."""
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def confusion_of(
    model: FCN,
    examples: Iterable[Example],
    num_classes: int,
    inference: InferenceConfig,
    device: torch.device,
    keep: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """The confusion matrix of all examples: int64 [C, C] (predicted, true), C = `num_classes`.
    `model` must be in evaluation mode on `device`. `keep` is called with each image's number and
    predicted classes, int64 [H, W]. Raises UserError for scores that are no finite numbers: of
    them the first would be the class.
    """
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for example in examples:
        pixels = example.pixels[None].to(device)
        if inference.window:
            logits = slide(model.scores, pixels, inference.window, inference.stride)
        else:
            logits = model.scores(pixels)
        if not bool(logits.isfinite().all()):
            raise UserError(f"{printable(str(example.path))}: the network's scores are not finite")
        height, width = example.labels.shape
        predicted = assign(logits, (height, width), model.align_corners)[0].cpu().numpy()
        if keep:
            keep(example.index, predicted)
        confusion += confusion_matrix(predicted, example.labels, num_classes, num_classes)
    return confusion


def score_rows(confusion: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Rows of an int64 [C, C] confusion matrix (predicted, true): miou, mean_accuracy,
    pixel_accuracy and the iou of each class.

    A class in neither labels nor predictions has no IoU, and a class without labelled pixels has no
    accuracy: the means skip them. Raises ValueError if no pixel is labelled.
    """
    hit, predicted, true = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    if not true.any():
        raise ValueError("no labelled pixel to score")
    union = predicted + true - hit
    iou = np.divide(hit, union, where=union > 0, out=np.full(len(hit), np.nan))
    rows: list[Row] = [
        {"metric": "miou", "value": float(np.nanmean(iou))},
        {"metric": "mean_accuracy", "value": float(np.mean(hit[true > 0] / true[true > 0]))},
        {"metric": "pixel_accuracy", "value": float(hit.sum() / true.sum())},
    ]
    rows += [
        {"metric": "iou", "class": name, "value": float(value)}
        for name, value in zip(names, iou, strict=True)
        if not np.isnan(value)
    ]
    return rows
