"""Dense k-NN in which the pixels of the nearest cells vote, each for the pixel at its place (CAPI,
arXiv 2502.08769).

Letters: B images, R their side in pixels, L pixels of a cell, M cells in the memory, Q cells to
classify, D features, h w cells of an image, C classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.probes.memory import LabelledFeatures
from evaluation.probes.retrieval import nearest

VOTES = 2**24
"""Labels of neighbours held at once."""


@dataclass(frozen=True)
class PixelMemory:
    """M cells, in the order of their images, each with the labels of its pixels."""

    features: Tensor
    """float32 [M, D], on the network's device."""
    labels: Tensor
    """uint8 [M, L]; void is C, above all classes."""
    image: Tensor
    """int64 [M], the number of each cell's image."""
    num_classes: int

    @property
    def class_of_cell(self) -> Tensor:
        """int64 [M]: the most frequent label of each cell, on a tie the lowest."""
        return self.labels.mode(dim=1).values.long()

    def only(self, chosen: Tensor) -> "PixelMemory":
        """The cells where bool [M] `chosen` is true."""
        return PixelMemory(
            self.features[chosen], self.labels[chosen], self.image[chosen], self.num_classes
        )

    def known(self) -> "PixelMemory":
        """The cells to learn from: those whose most frequent label is a class. Raises ValueError if
        there are none.
        """
        known = self.only(self.class_of_cell < self.num_classes)
        if not len(known.labels):
            raise ValueError("no labelled pixel to learn from")
        return known


def gather_pixels(batches: Iterable[LabelledFeatures], num_classes: int) -> PixelMemory:
    """All cells. Raises ValueError if a side is no multiple of the cells."""
    features, labels, image = [], [], []
    for batch in batches:
        height, width = batch.features.shape[2:]
        pixels = torch.from_numpy(batch.labels).clamp_max(num_classes)
        features.append(batch.features.permute(0, 2, 3, 1).flatten(0, 2))
        labels.append(split_pixels(pixels, height, width).to(batch.features.device))
        image.append(torch.from_numpy(batch.squares.index).repeat_interleave(height * width))
    return PixelMemory(
        torch.cat(features), torch.cat(labels), torch.cat(image).to(labels[0].device), num_classes
    )


def split_pixels(labels: Tensor, height: int, width: int) -> Tensor:
    """Labels [B, R, R] → [B·h·w, L]: the pixels of each cell, by rows. Raises ValueError."""
    side = labels.shape[1]
    if side % height or side % width:
        raise ValueError(f"{side} pixels are no multiple of {height} × {width} cells: set --size")
    down, across = side // height, side // width
    cells = labels.reshape(-1, height, down, width, across).transpose(2, 3)
    return cells.reshape(-1, down * across)


def join_pixels(cells: Tensor, size: int) -> Tensor:
    """[B, L, h, w], the pixels of each cell by rows → int64 [B, R, R], R = `size`."""
    batch, _, height, width = cells.shape
    down, across = size // height, size // width
    maps = cells.reshape(batch, down, across, height, width).permute(0, 3, 1, 4, 2)
    return maps.reshape(batch, size, size).long()


class PixelVote:
    """Cells [Q, D] → labels [Q, L]: at each place, the most frequent label there of the k =
    `neighbours` nearest cells of `memory`; void (C) votes, too. On a tie the lowest wins.
    """

    def __init__(self, memory: PixelMemory, *, neighbours: int, distance: str) -> None:
        """`distance`: cosine or L2."""
        keys = memory.features
        self.cosine, self.neighbours, self.labels = distance == "cosine", neighbours, memory.labels
        if self.cosine:
            self.keys = F.normalize(keys)
        else:  # 2 q·k - k² orders keys as the distance does
            self.keys = torch.cat([2 * keys, -keys.square().sum(dim=1, keepdim=True)], dim=1)

    def __call__(self, cells: Tensor) -> Tensor:
        step = max(1, VOTES // (self.neighbours * self.labels.shape[1]))
        votes = (self._neighbours(chunk) for chunk in cells.split(step))
        return torch.cat([self.labels[number].mode(dim=1).values for number in votes])

    def _neighbours(self, cells: Tensor) -> Tensor:
        queries = F.normalize(cells) if self.cosine else F.pad(cells, (0, 1), value=1.0)
        return nearest(queries, self.keys, self.neighbours)[1]
