"""Dense k-NN in which the pixels of the nearest cells vote, each for the pixel at its place (CAPI,
arXiv 2502.08769).

Letters: B images, R their side in pixels, L pixels of a cell, M cells in the memory, Q cells to
classify, D features, h w cells of an image, C classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.probes.memory import LabelledFeatures
from evaluation.probes.nearest import Distance, NearestCells
from evaluation.probes.storage import Storage

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

    def known(self, among: Tensor | None = None) -> Tensor:
        """bool [M]: the cells to learn from, of bool [M] `among` those whose most frequent label is
        a class. Raises ValueError if there are none.
        """
        known = self.class_of_cell < self.num_classes
        known = known if among is None else known & among
        if not known.any():
            raise ValueError("no labelled pixel to learn from")
        return known


def room_for_pixels(
    first: LabelledFeatures, num_images: int, *, copies: int = 0
) -> tuple[int, int, int]:
    """As `memory.room_for`; the `copies` are of whole cells. Raises ValueError as `split_pixels`
    does.
    """
    _, dim, height, width = first.features.shape
    count = split_pixels(torch.from_numpy(first.labels), height, width).shape[1]
    return num_images * height * width, dim, count + dim + 24 + copies * (4 * dim + count + 8)


def gather_pixels(
    batches: Iterable[LabelledFeatures], num_images: int, num_classes: int
) -> PixelMemory:
    """All cells of `num_images` images. Raises ValueError if a side is no multiple of the cells,
    UserError if they do not fit in memory.
    """
    memory: PixelMemory | None = None
    kept = 0
    for batch in batches:
        (_, _, height, width), device = batch.features.shape, batch.features.device
        pixels = torch.from_numpy(batch.labels).clamp_max(num_classes)
        labels = split_pixels(pixels, height, width)
        if memory is None:
            room = room_for_pixels(batch, num_images)
            memory = PixelMemory(
                Storage(whole=True).allocate(*room, device),
                torch.empty(room[0], labels.shape[1], dtype=torch.uint8, device=device),
                torch.empty(room[0], dtype=torch.int64, device=device),
                num_classes,
            )
        rows, kept = slice(kept, kept + len(labels)), kept + len(labels)
        memory.features[rows] = batch.features.permute(0, 2, 3, 1).flatten(0, 2)
        memory.labels[rows] = labels.to(device)
        index = torch.from_numpy(batch.squares.index)
        memory.image[rows] = index.repeat_interleave(height * width).to(device)
    if memory is None:
        raise ValueError("no cells to learn from")
    return memory


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

    def __init__(
        self, memory: PixelMemory, among: Tensor, *, neighbours: int, distance: Distance
    ) -> None:
        """The neighbours are cells where bool [M] `among` is true."""
        self.search = NearestCells(memory.features, distance=distance, among=among)
        self.neighbours, self.labels = neighbours, memory.labels

    def __call__(self, cells: Tensor) -> Tensor:
        _, numbers = self.search(cells, self.neighbours)
        step = max(1, VOTES // (self.neighbours * self.labels.shape[1]))
        return torch.cat([self.labels[near].mode(dim=1).values for near in numbers.split(step)])
