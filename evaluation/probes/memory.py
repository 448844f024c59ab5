"""The memory that every probe is fitted to: a bounded sample of the cells of a set, each with its
feature and the labels of its pixels.

Letters: B images, N images of the set, D features, h w cells of an image, M cells kept, C classes,
R the side of an evaluated image in pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.confusion import confusion_matrix
from evaluation.datasets.squares import Squares
from evaluation.probes.storage import Storage


@dataclass(frozen=True)
class LabelledFeatures:
    """B images, their features and their labels."""

    squares: Squares
    features: Tensor
    """float32 [B, D, h, w], on the network's device."""
    labels: np.ndarray
    """uint8 [B, R, R], void as 255."""


@dataclass(frozen=True)
class Memory:
    """M cells, in the order of their images."""

    features: Tensor
    """[M, D], where and as their `Storage` says; in half precision of length 1, which float16 can
    hold."""
    counts: Tensor
    """Integers [M, C], beside them: pixels of the cell with each label, at least one in all."""
    complete: bool
    """It holds all labelled cells of the set: another seed would draw the same ones."""


def cell_counts(labels: np.ndarray, height: int, width: int, num_classes: int) -> np.ndarray:
    """Labels uint8 [B, R, R] → int64 [B, hw, C]: pixels of each cell with each label.

    A pixel belongs to the cell that contains its centre. Void pixels belong to no cell.
    """
    batch, rows, columns = labels.shape
    row = (2 * np.arange(rows) + 1) * height // (2 * rows)
    column = (2 * np.arange(columns) + 1) * width // (2 * columns)
    cell = row[:, None] * width + column  # [R, R]
    cells = np.arange(batch)[:, None, None] * (height * width) + cell
    counts = confusion_matrix(cells, labels, batch * height * width, num_classes)
    return counts.reshape(batch, height * width, num_classes)


def draw_cells(
    counts: np.ndarray, quota: int, generator: np.random.Generator, *, balanced: bool
) -> np.ndarray:
    """Up to `quota` labelled cells of one image's `counts` [hw, C], as sorted int64 numbers.

    Each cell gets a random rank, and the lowest ranks are drawn. The rank is u, uniform in [0, 1).
    With `balanced` it is u · Σ_c n_c over the classes c that the cell shows, where n_c cells of the
    image show class c: cells with rarer classes are more likely (arXiv 2306.01667, appendix).
    """
    shows = counts > 0
    labelled = np.flatnonzero(shows.any(axis=1))
    rank = generator.random(len(counts))
    if balanced:
        rank = rank * (shows @ shows.sum(axis=0))
    return np.sort(labelled[np.argsort(rank[labelled], kind="stable")[:quota]])


def integers(most: int) -> torch.dtype:
    """The smallest type of integers that holds 0 … `most`."""
    types = torch.uint8, torch.int16, torch.int32
    return next(dtype for dtype in types if most <= torch.iinfo(dtype).max)


def room_for(
    first: LabelledFeatures, num_images: int, num_classes: int, *, capacity: int, copies: int = 0
) -> tuple[int, int, int]:
    """The cells, their features, and the bytes a cell beside these, of the memory of `num_images`
    images like `first`: what `Storage.allocate` asks for. `copies`: of the features, which the work
    makes in float32.
    """
    _, dim, height, width = first.features.shape
    beside = num_classes * _counts_type(first).itemsize + dim + 16  # the search's, too
    return min(capacity, num_images * height * width), dim, beside + 4 * dim * copies


def _counts_type(first: LabelledFeatures) -> torch.dtype:
    """Holds the number of pixels of a cell."""
    (_, _, height, width), (_, rows, columns) = first.features.shape, first.labels.shape
    return integers(-(-rows // height) * -(-columns // width))


def gather_memory(
    batches: Iterable[LabelledFeatures],
    num_images: int,
    num_classes: int,
    *,
    capacity: int,
    seed: int,
    balanced: bool,
    storage: Storage = Storage(),  # noqa: B008  it is frozen
) -> Memory:
    """Read `batches` once and keep at most `capacity` cells, the same number from each of the
    `num_images` images of the set.

    The cells drawn from an image depend only on `seed` and its number, not on the batches. Raises
    ValueError if no cell has a labelled pixel, and UserError if `storage` has no room.
    """
    features: Tensor | None = None
    kept, skipped = 0, 0
    for batch in batches:
        (_, _, height, width), device = batch.features.shape, batch.features.device
        counts = cell_counts(batch.labels, height, width, num_classes)
        if features is None:
            room = room_for(batch, num_images, num_classes, capacity=capacity)
            features, dtype = storage.allocate(*room, device), _counts_type(batch)
            all_counts = torch.empty(room[0], num_classes, dtype=dtype, device=features.device)
        for image, i in enumerate(batch.squares.index.tolist()):
            quota = (i + 1) * capacity // num_images - i * capacity // num_images
            generator = np.random.default_rng((seed, i))
            cells = draw_cells(counts[image], quota, generator, balanced=balanced)
            place, kept = slice(kept, kept + len(cells)), kept + len(cells)
            drawn = batch.features[image].flatten(1).T[torch.from_numpy(cells).to(device)]
            half = features.dtype == torch.float16
            features[place] = (F.normalize(drawn) if half else drawn).to(features)
            all_counts[place] = torch.from_numpy(counts[image][cells]).to(all_counts)
            skipped += int(counts[image].any(axis=1).sum()) - len(cells)
    if features is None or not kept:
        raise ValueError("no labelled pixel to learn from")
    return Memory(features[:kept], all_counts[:kept], complete=not skipped)
