"""The segments nearest to each prototype, and how often it is active (arXiv 2205.15288, figure 3).

Letters: B images, K prototypes, D features, H W cells, T segments kept for each prototype.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.segment import Segmented


def segment_similarity(scores: Tensor, features: Tensor) -> Tensor:
    """Scores [B, K, H, W], features [B, D, H, W] → [B, K]: how close each prototype's segment is.

    A prototype's segment are the cells that it wins, its slot their mean feature; the result is the
    cosine of slot and prototype, -inf where the prototype wins no cell. The prototypes themselves
    are not needed: a score times the length of its feature is already the projection onto one.
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
    """The T nearest segments of each of K prototypes, gathered over a stream of images.

    Holds a few numbers for each prototype and no pixels, whatever the number of images.
    """

    def __init__(self, num_prototypes: int, top: int) -> None:
        self.images = 0
        """Images seen."""
        self.active = np.zeros(num_prototypes, np.int64)
        """int64 [K], images in which the prototype wins at least one cell."""
        self.similarity = np.full((num_prototypes, top), -np.inf, np.float32)
        """float32 [K, T], best first; -inf where the prototype was active in fewer than T images.
        """
        self.image = np.full((num_prototypes, top), -1, np.int64)
        """int64 [K, T], the image of each of these segments; -1 for none."""

    def add(self, index: np.ndarray, similarity: np.ndarray) -> None:
        """Take in images `index` int64 [B] with `similarity` [B, K], -inf where not active."""
        self.images += len(index)
        self.active += np.isfinite(similarity).sum(axis=0)
        values = np.concatenate([self.similarity, similarity.T], axis=1)
        number = np.where(np.isfinite(similarity.T), index, -1)
        numbers = np.concatenate([self.image, number], axis=1)
        # Stable, so that of equals the first one seen stays, whatever the batch size.
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.similarity.shape[1]]
        self.similarity = np.take_along_axis(values, best, axis=1)
        self.image = np.take_along_axis(numbers, best, axis=1)

    def by_frequency(self) -> np.ndarray:
        """int64: the prototypes that were active at all, the most frequent first."""
        order = np.argsort(-self.active, kind="stable")
        return order[self.active[order] > 0]


def gather_nearest(batches: Iterable[Segmented], top: int) -> NearestSegments:
    """Run through `batches` once. Raises ValueError if there are none."""
    nearest: NearestSegments | None = None
    for batch in batches:
        similarity = segment_similarity(batch.scores, batch.features).cpu().numpy()
        if nearest is None:
            nearest = NearestSegments(similarity.shape[1], top)
        nearest.add(batch.squares.index, similarity)
    if nearest is None:
        raise ValueError("no images to look at")
    return nearest
