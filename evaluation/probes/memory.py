"""A bounded sample of a set's cells, each with its feature and the labels of its pixels: what every
probe is fitted to.

Letters: B images, N images of the set, D features, h w cells of an image, M cells kept, C classes,
R the side of an evaluated image in pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.grouping import confusion_matrix
from evaluation.labelled import LabelledFeatures


@dataclass(frozen=True)
class Memory:
    """M cells, in the order of their images."""

    features: Tensor
    """float32 [M, D], on the network's device."""
    counts: Tensor
    """float32 [M, C]: pixels of the cell that bear each label; at least one does."""
    complete: bool
    """All labelled cells of the set are here, so that another seed would draw the same ones."""


def cell_counts(labels: np.ndarray, height: int, width: int, num_classes: int) -> np.ndarray:
    """Labels uint8 [B, R, R] → int64 [B, hw, C]: pixels of each cell that bear each label.

    A pixel belongs to the cell that its centre lies in; void pixels to none.
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

    All are as likely, or with `balanced` those that show the image's rarer classes are more so: the
    cells whose u · Σ n_c is lowest are taken, u uniform in [0, 1), n_c the number of cells that
    show class c, summed over the classes of the cell (arXiv 2306.01667, appendix).
    """
    shows = counts > 0
    labelled = np.flatnonzero(shows.any(axis=1))
    rank = generator.random(len(counts))
    if balanced:
        rank = rank * (shows @ shows.sum(axis=0))
    return np.sort(labelled[np.argsort(rank[labelled], kind="stable")[:quota]])


def gather_memory(
    batches: Iterable[LabelledFeatures],
    num_images: int,
    num_classes: int,
    *,
    capacity: int,
    seed: int,
    balanced: bool,
) -> Memory:
    """At most `capacity` cells of the set that `batches` runs through once, as many of each of its
    N = `num_images` images as fit.

    What is drawn of an image depends on `seed` and its number only, not on the batches. Raises
    ValueError if no cell has a labelled pixel.
    """
    features: Tensor | None = None
    kept, left_out = 0, 0
    for batch in batches:
        _, dim, height, width = batch.features.shape
        counts = cell_counts(batch.labels, height, width, num_classes)
        if features is None:
            room = min(capacity, num_images * height * width)
            features = batch.features.new_empty(room, dim)
            all_counts = batch.features.new_empty(room, num_classes)
        for image, i in enumerate(batch.squares.index.tolist()):
            quota = (i + 1) * capacity // num_images - i * capacity // num_images
            generator = np.random.default_rng((seed, i))
            cells = draw_cells(counts[image], quota, generator, balanced=balanced)
            place, kept = slice(kept, kept + len(cells)), kept + len(cells)
            number = torch.from_numpy(cells).to(features.device)
            features[place] = batch.features[image].flatten(1).T[number]
            all_counts[place] = torch.from_numpy(counts[image][cells]).to(all_counts)
            left_out += int(counts[image].any(axis=1).sum()) - len(cells)
    if features is None or not kept:
        raise ValueError("no labelled pixel to learn from")
    return Memory(features[:kept], all_counts[:kept], complete=not left_out)
