"""The linear classifier of Leopart and NeCo: a 1 × 1 convolution on upsampled features, trained by
SGD on random crops.

Letters: B images, D features, h w cells, C classes, S the side of a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets.images import torch_nearest
from evaluation.datasets.label_maps import VOID
from evaluation.datasets.random_squares import RandomSquares
from evaluation.features import Features
from pipeline.errors import UserError

MASK_SIDE = 100


@dataclass(frozen=True)
class Schedule:
    """How the classifier is trained; defaults as Leopart trains it on VOC."""

    learning_rate: float = 0.01
    epochs: int = 25
    step_images: int = 60
    """Images of a step; those that fill no step are left out, as by PyTorch's drop_last."""
    drop_after: int = 20
    """The learning rate is a tenth after so many epochs."""


def fit_sgd(features: Features, squares: RandomSquares, seed: int, schedule: Schedule) -> nn.Module:
    """A classifier of cells [Q, D] → logits [Q, C], in eval mode.

    SGD with momentum 0.9 and weight decay 1e-4 on the cross-entropy of masks of 100 × 100 pixels.
    Reads all images once an epoch. Raises UserError if there are fewer images than a step has.
    """
    count = len(squares.images)
    steps = count // schedule.step_images
    if not steps:
        raise UserError(
            f"{squares.images.source}: {count} images do not fill a step of {schedule.step_images}"
            " (--step-images, if no --protocol sets it)"
        )
    model: nn.Linear | None = None
    for epoch in range(schedule.epochs):
        order = np.random.default_rng((seed, epoch)).permutation(count)
        order = order[: steps * schedule.step_images]
        label = f"{features.name}: epoch {epoch + 1} of {schedule.epochs}"
        for maps, masks in _steps(features, squares.of_epoch(epoch), order, schedule, label):
            if model is None:
                model = _start(maps.shape[1], squares.images.num_classes, seed).to(maps.device)
                optimiser = torch.optim.SGD(
                    model.parameters(), schedule.learning_rate, momentum=0.9, weight_decay=1e-4
                )
            if epoch == schedule.drop_after:
                optimiser.param_groups[0]["lr"] = schedule.learning_rate / 10
            loss = mask_loss(model, maps, masks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert model is not None
    return model.eval()


def mask_loss(model: nn.Linear, maps: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled pixels of `masks` int64 [B, S, S], given features
    [B, D, h, w]: the logits of cells, upsampled bilinearly (or logits of upsampled features, which
    are the same); 0 if no pixel is labelled.
    """
    logits = F.conv2d(maps, model.weight[:, :, None, None], model.bias)
    upsampled = F.interpolate(logits, masks.shape[1:], mode="bilinear")
    loss = F.cross_entropy(upsampled, masks, ignore_index=VOID, reduction="sum")
    return loss / (masks != VOID).sum().clamp_min(1)


def _start(dim: int, num_classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(dim, num_classes)


def _steps(
    features: Features, squares: RandomSquares, order: np.ndarray, schedule: Schedule, label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, D, h, w] and masks int64 [B, 100, 100] of the images of each step."""
    maps: list[Tensor] = []
    masks: list[np.ndarray] = []
    for batch in squares.batches(label, order):
        maps += features(batch.normalised(squares.device)).clone()  # out of inference mode
        masks += [*torch_nearest(squares.labels(batch), MASK_SIDE)]
        while len(maps) >= schedule.step_images:
            step, maps = maps[: schedule.step_images], maps[schedule.step_images :]
            labels, masks = masks[: schedule.step_images], masks[schedule.step_images :]
            yield torch.stack(step), torch.from_numpy(np.stack(labels)).long().to(squares.device)
