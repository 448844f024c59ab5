"""How often prototypes are active over a set of images, and the segments nearest to each
(arXiv 2205.15288, figure 3).

A prototype is active in an image if it wins at least one cell.

Letters: N images, B images of a batch, K prototypes, D features, H W cells, T segments kept for
each prototype.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.segment import Segmented
from model.grouping import won_cells
from train.health import usage_entropy


def segment_similarity(scores: Tensor, features: Tensor) -> Tensor:
    """Scores [B, K, H, W], features [B, D, H, W] → [B, K]: similarity of each prototype and its
    segment.

    The segment of a prototype is the set of cells that it wins; its slot is their mean feature. The
    similarity is the cosine of slot and prototype, -inf if the prototype wins no cell. The
    prototypes are not needed: a score times the length of its feature is the projection of the
    feature onto the prototype.
    """
    num_prototypes = scores.shape[1]
    won = F.one_hot(scores.argmax(dim=1).flatten(1), num_prototypes).to(scores)  # [B, HW, K]
    features = features.flatten(2)  # [B, D, HW]
    projection = scores.flatten(2) * features.norm(dim=1, keepdim=True)  # [B, K, HW]
    along = torch.einsum("bnk,bkn->bk", won, projection)
    length = torch.einsum("bnk,bdn->bkd", won, features).norm(dim=2)
    cosine = along / length.clamp_min(torch.finfo(length.dtype).tiny)
    return cosine.masked_fill(~won.bool().any(dim=1), -torch.inf)


class NearestSegments:
    """The T nearest segments of each of K prototypes, collected from a stream of images.

    Its memory does not depend on the number of images, and it holds no pixels.
    """

    def __init__(self, num_prototypes: int, top: int) -> None:
        self.images = 0
        """Images seen."""
        self.active = np.zeros(num_prototypes, np.int64)
        """int64 [K], images in which the prototype wins at least one cell."""
        self.similarity = np.full((num_prototypes, top), -np.inf, np.float32)
        """float32 [K, T], best first; -inf if the prototype was active in fewer than T images."""
        self.image = np.full((num_prototypes, top), -1, np.int64)
        """int64 [K, T], the image of each segment; -1 for none."""

    def add(self, index: np.ndarray, similarity: np.ndarray) -> None:
        """Add images `index` int64 [B] with `similarity` [B, K], -inf for inactive prototypes."""
        self.images += len(index)
        self.active += np.isfinite(similarity).sum(axis=0)
        values = np.concatenate([self.similarity, similarity.T], axis=1)
        number = np.where(np.isfinite(similarity.T), index, -1)
        numbers = np.concatenate([self.image, number], axis=1)
        # A stable sort keeps the first of equals, whatever the batch size.
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.similarity.shape[1]]
        self.similarity = np.take_along_axis(values, best, axis=1)
        self.image = np.take_along_axis(numbers, best, axis=1)

    def by_frequency(self) -> np.ndarray:
        """int64: the prototypes that were active in an image, the most frequent first."""
        order = np.argsort(-self.active, kind="stable")
        return order[self.active[order] > 0]


@dataclass(frozen=True)
class SlotStatistics:
    """Use of K prototypes in N images."""

    slots: np.ndarray
    """int64 [N], active slots of each image."""
    cells: np.ndarray
    """int64 [K], cells that each prototype wins."""
    nearest: NearestSegments

    @property
    def entropy(self) -> float:
        """Entropy of the prototypes' shares of cells, as a share of log K."""
        return usage_entropy(torch.from_numpy(self.cells))

    @property
    def dead(self) -> int:
        """Number of dead prototypes: those that win no cell."""
        return int((self.cells == 0).sum())


def gather_statistics(batches: Iterable[Segmented], top: int) -> SlotStatistics:
    """Read `batches` once and keep the `top` nearest segments of each prototype. Raises ValueError
    if there are no batches.
    """
    nearest: NearestSegments | None = None
    slots: list[np.ndarray] = []
    cells: np.ndarray | int = 0
    for batch in batches:
        won = won_cells(batch.scores).cpu().numpy()
        if nearest is None:
            nearest = NearestSegments(won.shape[1], top)
        similarity = segment_similarity(batch.scores, batch.features)
        nearest.add(batch.squares.index, similarity.cpu().numpy())
        slots.append((won > 0).sum(axis=1))
        cells = cells + won.sum(axis=0)
    if nearest is None:
        raise ValueError("no images to look at")
    return SlotStatistics(np.concatenate(slots), np.asarray(cells), nearest)
