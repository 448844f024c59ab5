"""Over-clustering probe: many clusters, each named after the class of most of its pixels.

Letters: M cells in the memory, Q cells to classify, D features, K clusters, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.probes.memory import Memory
from model.kmeans import Clusters

LOGITS = 2**24
"""Logits of cells and clusters held at once: 64 MiB."""


def assign_cells(clustering: Clusters, cells: Tensor) -> Tensor:
    """Cells [M, D] → int64 [M], the cluster of each. Processes `LOGITS` logits at a time."""
    chunks = cells.split(max(1, LOGITS // len(clustering.centres)))
    logits = (clustering.logits(chunk[:, :, None, None]) for chunk in chunks)
    return torch.cat([each.argmax(dim=1).flatten() for each in logits])


def majority(clusters: Tensor, counts: Tensor, num_clusters: int) -> Tensor:
    """Clusters int64 [M] and pixel counts [M, C] of the same cells → int64 [K]: the class of most
    pixels of each cluster; on a tie, the class with the lower id. A cluster without cells takes the
    most frequent class of the set.
    """
    pixels = counts.new_zeros(num_clusters, counts.shape[1], dtype=torch.float64)
    pixels.index_add_(0, clusters, counts.double())
    empty = pixels.sum(dim=1) == 0
    return torch.where(empty, pixels.sum(dim=0).argmax(), pixels.argmax(dim=1))


class Overclustering:
    """Cells [Q, D] → class scores [Q, C]: 1 for the class of the cell's cluster, 0 for the others.
    `memory` determines the class of each cluster.
    """

    def __init__(self, memory: Memory, clustering: Clusters) -> None:
        self.clustering, self.num_classes = clustering, memory.counts.shape[1]
        winner = assign_cells(clustering, memory.features)
        self.classes = majority(winner, memory.counts, len(clustering.centres))

    def __call__(self, cells: Tensor) -> Tensor:
        classes = self.classes[assign_cells(self.clustering, cells)]
        return F.one_hot(classes, self.num_classes).float()
