"""The teacher's grouping of whole images, batch by batch.

Letters: B images, K prototypes, D features, h w cells, R the side of an evaluated image in pixels.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.datasets.squares import SquareImages, Squares
from evaluation.features import in_one_line
from model import SlotCon
from model.timm_encoder import TimmEncoder

UPSAMPLED_FLOATS = 2**24
"""Floats of upsampled scores held at once: 64 MiB, whatever K and R are."""


class Segmenter(Protocol):
    """A network with prototypes; `model.SlotCon` is one."""

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, R, R] → cosine scores [B, K, h, w], features [B, D, h, w]."""


@dataclass(frozen=True)
class Segmented:
    """B images and the network's outputs, on the network's device."""

    squares: Squares
    scores: Tensor
    """float32 [B, K, h, w], cosine of prototype and cell."""
    features: Tensor
    """float32 [B, D, h, w], output of the projector."""


def segment_images(
    network: Segmenter,
    squares: SquareImages,
    progress: str | None = None,
    indices: np.ndarray | None = None,
) -> Iterator[Segmented]:
    """Segment images, one batch in memory at a time; arguments as in `SquareImages.batches`."""
    of_timm = isinstance(network, SlotCon) and isinstance(network.teacher.encoder, TimmEncoder)
    for batch in squares.batches(progress, indices):
        with torch.inference_mode():
            images = batch.normalised(squares.device)
            with in_one_line("the encoder", images) if of_timm else nullcontext():
                scores, features = network.segment(images)
        yield Segmented(batch, scores.float(), features.float())


def assign_cells(scores: Tensor, size: int) -> Tensor:
    """Scores [B, K, h, w] → int64 [B, R, R]: the prototype with the highest score in the cell that
    torch's nearest neighbour takes for each pixel.
    """
    winner = scores.argmax(dim=1, keepdim=True).double()
    return F.interpolate(winner, (size, size), mode="nearest")[:, 0].long()


def assign(scores: Tensor, size: int | tuple[int, int], align_corners: bool = False) -> Tensor:
    """Scores [B, K, h, w] → int64 [B, H, W]: the prototype with the highest score at each pixel.

    Scores are upsampled bilinearly to `size`: R = H = W, or (H, W). A few prototypes are upsampled
    at a time and compared with the best so far. All at once would need 840 MB an image for K = 2048
    at R = 320.
    """
    height, width = (size, size) if isinstance(size, int) else size
    step = max(1, UPSAMPLED_FLOATS // (len(scores) * height * width))
    best = scores.new_full((len(scores), height, width), -torch.inf)
    winner = torch.zeros(best.shape, dtype=torch.int64, device=scores.device)
    for first in range(0, scores.shape[1], step):
        upsampled = F.interpolate(
            scores[:, first : first + step],
            (height, width),
            mode="bilinear",
            align_corners=align_corners,
        )
        value, index = upsampled.max(dim=1)
        winner = torch.where(value > best, index + first, winner)
        best = torch.maximum(best, value)
    return winner
