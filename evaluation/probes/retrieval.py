"""Dense k-NN retrieval: a cell takes the labels of the nearest training cells (Hummingbird,
arXiv 2306.01667, section 3).

Letters: Q cells to classify, M cells in the memory, D features, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.probes.memory import Memory

SIMILARITY_FLOATS = 2**24
"""Similarities held at once: 64 MiB, whatever Q and M are."""


def nearest(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Queries [Q, D], keys [M, D] → the k largest products of each query [Q, k], in descending
    order, and the numbers of their keys int64 [Q, k]; k = min(`count`, M).

    Compares a few keys at a time and keeps the best so far.
    """
    step = max(1, SIMILARITY_FLOATS // len(queries))
    best = queries.new_empty(len(queries), 0)
    number = torch.empty(best.shape, dtype=torch.int64, device=queries.device)
    for first in range(0, len(keys), step):
        products = queries @ keys[first : first + step].T
        value, index = products.topk(min(count, products.shape[1]), dim=1)
        best = torch.cat([best, value], dim=1)
        number = torch.cat([number, index + first], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        number = number.gather(1, order)
    return best, number


class Retrieval:
    """Cells [Q, D] → class scores [Q, C]: mean of the label shares of the k = `neighbours` nearest
    cells of `memory`, weighted by softmax(cosine / `temperature`).
    """

    def __init__(self, memory: Memory, *, neighbours: int = 30, temperature: float = 0.02) -> None:
        self.keys = F.normalize(memory.features)
        self.labels = memory.counts / memory.counts.sum(dim=1, keepdim=True)
        self.neighbours, self.temperature = neighbours, temperature

    def __call__(self, cells: Tensor) -> Tensor:
        similarity, number = nearest(F.normalize(cells), self.keys, self.neighbours)
        weights = (similarity / self.temperature).softmax(dim=1)
        return F.embedding_bag(number, self.labels, per_sample_weights=weights, mode="sum")
